/* The part of CANN's runtime that torch_npu needs, on a host: device memory is host memory, and whatever is put into a
 * stream has happened when the call returns. There are no operators: asking for one is an error, never a silent success.
 * Compiled against the headers inside the torch_npu wheel, so that the compiler checks the prototypes. */

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { OUT_OF_MEMORY = 207001, NO_SUCH_DEVICE = 107001, BAD_SIZE = 100000, NO_SUCH_OPERATOR = 500001 };
enum { ALIGNMENT = 512, TAIL = 64 }; /* bytes; operators may read a little past the end */

/* ------------------------------------------------------------------------------------------------------- devices */

static __thread int32_t current_device;

static int32_t device_count(void)
{
    const char *given = getenv("CANN_STUB_DEVICES");
    return given ? atoi(given) : 1;
}

const char *aclrtGetSocName(void) { return "Ascend910B3"; }

const char *aclGetRecentErrMsg(void) { return "CANN stub: there is no Ascend runtime on this machine"; }

aclError aclrtGetDeviceCount(uint32_t *count)
{
    *count = (uint32_t)device_count();
    return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device)
{
    if (device < 0 || device >= device_count())
        return NO_SUCH_DEVICE;
    current_device = device;
    return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t *device)
{
    *device = current_device;
    return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext *context)
{
    *context = (void *)(uintptr_t)(0x100 + current_device);
    return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active)
{
    (void)device;
    if (flags)
        *flags = 0;
    if (active)
        *active = 1;
    return ACL_SUCCESS;
}

aclError aclrtGetDeviceUtilizationRate(int32_t device, aclrtUtilizationInfo *info)
{
    (void)device;
    memset(info, 0, sizeof *info);
    return ACL_SUCCESS;
}

/* -------------------------------------------------------------------------------------------------------- memory */

static aclError allocate(void **at, size_t size)
{
    return posix_memalign(at, ALIGNMENT, size + TAIL) ? OUT_OF_MEMORY : ACL_SUCCESS;
}

aclError aclrtMalloc(void **at, size_t size, aclrtMemMallocPolicy policy)
{
    (void)policy;
    return allocate(at, size);
}

aclError aclrtMallocAlign32(void **at, size_t size, aclrtMemMallocPolicy policy)
{
    (void)policy;
    return allocate(at, size);
}

aclError aclrtMallocHost(void **at, size_t size) { return allocate(at, size); }

aclError aclrtMallocHostWithCfg(void **at, uint64_t size, aclrtMallocConfig *config)
{
    (void)config;
    return allocate(at, size);
}

aclError aclrtFree(void *at)
{
    free(at);
    return ACL_SUCCESS;
}

aclError aclrtFreeHost(void *at) { return aclrtFree(at); }

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind)
{
    (void)kind;
    if (size > room)
        return BAD_SIZE;
    memmove(to, from, size);
    return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind, aclrtStream stream)
{
    (void)stream;
    return aclrtMemcpy(to, room, from, size, kind);
}

aclError aclrtMemset(void *at, size_t room, int32_t value, size_t size)
{
    if (size > room)
        return BAD_SIZE;
    memset(at, value, size);
    return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void *at, size_t room, int32_t value, size_t size, aclrtStream stream)
{
    (void)stream;
    return aclrtMemset(at, room, value, size);
}

aclError aclrtGetMemInfo(aclrtMemAttr kind, size_t *left, size_t *total)
{
    (void)kind;
    *left = *total = (size_t)64 << 30;
    return ACL_SUCCESS;
}

aclError aclrtPointerGetAttributes(const void *at, aclrtPtrAttributes *attributes)
{
    (void)at;
    memset(attributes, 0, sizeof *attributes);
    attributes->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    return ACL_SUCCESS;
}

/* -------------------------------------------------------------------------------------------- streams and events */

aclError aclrtCreateStream(aclrtStream *stream)
{
    static uintptr_t next = 0x1000;
    *stream = (void *)__sync_add_and_fetch(&next, 16);
    return ACL_SUCCESS;
}

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flags)
{
    (void)priority;
    (void)flags;
    return aclrtCreateStream(stream);
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status)
{
    (void)stream;
    *status = ACL_STREAM_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtStreamGetId(aclrtStream stream, int32_t *id)
{
    *id = (int32_t)(uintptr_t)stream;
    return ACL_SUCCESS;
}

aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *flag)
{
    (void)stream;
    *flag = 0;
    return ACL_SUCCESS;
}

aclError aclrtCreateEvent(aclrtEvent *event)
{
    *event = calloc(1, sizeof(struct timespec));
    return *event ? ACL_SUCCESS : OUT_OF_MEMORY;
}

aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag)
{
    (void)flag;
    return aclrtCreateEvent(event);
}

aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag)
{
    (void)flag;
    return aclrtCreateEvent(event);
}

aclError aclrtDestroyEvent(aclrtEvent event)
{
    free(event);
    return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream)
{
    (void)stream;
    clock_gettime(CLOCK_MONOTONIC, event);
    return ACL_SUCCESS;
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status)
{
    (void)event;
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status)
{
    (void)event;
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent begin, aclrtEvent end)
{
    const struct timespec *from = begin, *to = end;
    *milliseconds = (float)(to->tv_sec - from->tv_sec) * 1e3f + (float)(to->tv_nsec - from->tv_nsec) / 1e6f;
    return ACL_SUCCESS;
}

/* ----------------------------------------------------------------------------------------------------- operators */

struct aclDataBuffer {
    void *at;
    size_t size;
};

struct aclTensorDesc {
    aclDataType type;
    int dims;
    int64_t sizes[16];
};

aclDataBuffer *aclCreateDataBuffer(void *at, size_t size)
{
    aclDataBuffer *buffer = malloc(sizeof *buffer);
    buffer->at = at;
    buffer->size = size;
    return buffer;
}

aclError aclDestroyDataBuffer(const aclDataBuffer *buffer)
{
    free((void *)buffer);
    return ACL_SUCCESS;
}

aclTensorDesc *aclCreateTensorDesc(aclDataType type, int dims, const int64_t *sizes, aclFormat format)
{
    (void)format;
    if (dims > 16)
        return NULL;
    aclTensorDesc *desc = calloc(1, sizeof *desc);
    desc->type = type;
    desc->dims = dims;
    memcpy(desc->sizes, sizes, (size_t)dims * sizeof *sizes);
    return desc;
}

void aclDestroyTensorDesc(const aclTensorDesc *desc) { free((void *)desc); }

size_t aclGetCompileoptSize(aclCompileOpt option)
{
    (void)option;
    return 16;
}

aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t size)
{
    /* "disable": torch_npu then calls the aclnn operators, not the older ones that are compiled at run time */
    if (size)
        strncpy(value, option == ACL_OP_JIT_COMPILE ? "disable" : "0", size);
    return ACL_SUCCESS;
}

static size_t width(aclDataType type)
{
    switch (type) {
    case ACL_INT8: case ACL_UINT8: case ACL_BOOL:
        return 1;
    case ACL_FLOAT16: case ACL_BF16: case ACL_INT16: case ACL_UINT16:
        return 2;
    case ACL_INT64: case ACL_UINT64: case ACL_DOUBLE:
        return 8;
    default:
        return 4;
    }
}

static void fill(char *out, int64_t count, size_t size, const void *value)
{
    for (int64_t i = 0; i < count; i++)
        memcpy(out + (size_t)i * size, value, size);
}

static int64_t before(const aclTensorDesc *desc, const aclDataBuffer *paddings, int dim)
{
    return desc->type == ACL_INT64 ? ((int64_t *)paddings->at)[2 * dim] : ((int32_t *)paddings->at)[2 * dim];
}

/* in: the tensor, how far it is padded on both sides of each dimension, and the padding (zeros without one) */
static void pad(aclTensorDesc *const *descs, aclDataBuffer *const *in, int inputs, const aclTensorDesc *made, char *out)
{
    const size_t size = width(made->type);
    static const char zeros[8];
    const void *filling = inputs > 2 && in[2]->at ? in[2]->at : zeros;
    int64_t count = 1;
    for (int i = 0; i < made->dims; i++)
        count *= made->sizes[i];
    fill(out, count, size, filling);
    for (int64_t i = 0; i < count; i++) {
        int64_t rest = i, at = 0, step = 1;
        int inside = 1;
        for (int dim = made->dims - 1; dim >= 0; dim--) {
            int64_t place = rest % made->sizes[dim] - before(descs[1], in[1], dim);
            rest /= made->sizes[dim];
            inside &= place >= 0 && place < descs[0]->sizes[dim];
            at += place * step;
            step *= descs[0]->sizes[dim];
        }
        if (inside)
            memcpy(out + (size_t)i * size, (const char *)in[0]->at + (size_t)at * size, size);
    }
}

/* The two operators that torch_npu's collectives call below the dispatcher, where no kernel of Python's can stand. */
static aclError run(const char *name, int inputs, aclTensorDesc *const *in_descs, aclDataBuffer *const *in, int outputs,
                    aclTensorDesc *const *out_descs, aclDataBuffer *const *out)
{
    if (outputs != 1 || inputs < 2 || !in[1]->at)
        return NO_SUCH_OPERATOR;
    if (!strcmp(name, "Fill")) {
        int64_t count = 1;
        for (int i = 0; i < out_descs[0]->dims; i++)
            count *= out_descs[0]->sizes[i];
        fill(out[0]->at, count, width(out_descs[0]->type), in[1]->at);
        return ACL_SUCCESS;
    }
    if (!strcmp(name, "PadV3")) {
        pad(in_descs, in, inputs, out_descs[0], out[0]->at);
        return ACL_SUCCESS;
    }
    return NO_SUCH_OPERATOR;
}

aclError aclopCompileAndExecute(const char *name, int inputs, const aclTensorDesc *const in_descs[],
                                const aclDataBuffer *const in[], int outputs, const aclTensorDesc *const out_descs[],
                                aclDataBuffer *const out[], const aclopAttr *attributes, aclopEngineType engine,
                                aclopCompileType flag, const char *path, aclrtStream stream)
{
    (void)attributes, (void)engine, (void)flag, (void)path, (void)stream;
    return run(name, inputs, (aclTensorDesc *const *)in_descs, (aclDataBuffer *const *)in, outputs,
               (aclTensorDesc *const *)out_descs, out);
}

aclError aclopCompileAndExecuteV2(const char *name, int inputs, aclTensorDesc *in_descs[], aclDataBuffer *in[],
                                  int outputs, aclTensorDesc *out_descs[], aclDataBuffer *out[], aclopAttr *attributes,
                                  aclopEngineType engine, aclopCompileType flag, const char *path, aclrtStream stream)
{
    (void)attributes, (void)engine, (void)flag, (void)path, (void)stream;
    return run(name, inputs, in_descs, in, outputs, out_descs, out);
}
