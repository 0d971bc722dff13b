/* HCCL between the processes of one machine. A rank publishes its bytes as a file in CANN_STUB_DIR, written aside and
 * renamed, and reads those of the others; sums are made in the order of the ranks, so that they are the same everywhere.
 *
 *     <communicator>.<number of the collective>.<rank>              a collective
 *     <communicator>.from<rank>to<rank>.<number of the message>     point to point
 *
 * A peer that does not come is an error after CANN_STUB_TIMEOUT seconds. */

#include "acl/acl.h"
#include "hccl_types_c.h"

#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { RANKS = 1024, POLL = 100 /* microseconds */ };

typedef struct {
    char name[96];
    uint32_t rank, size;
    uint64_t collectives;                  /* so far */
    uint64_t sent[RANKS], received[RANKS]; /* messages to and from each rank */
} Communicator;

static size_t width(HcclDataType type)
{
    switch (type) {
    case HCCL_DATA_TYPE_INT8: case HCCL_DATA_TYPE_UINT8: case HCCL_DATA_TYPE_FP8E4M3: case HCCL_DATA_TYPE_FP8E5M2:
        return 1;
    case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_UINT16: case HCCL_DATA_TYPE_FP16: case HCCL_DATA_TYPE_BFP16:
        return 2;
    case HCCL_DATA_TYPE_INT32: case HCCL_DATA_TYPE_UINT32: case HCCL_DATA_TYPE_FP32:
        return 4;
    default:
        return 8;
    }
}

/* --------------------------------------------------------------------------------------------------------- files */

static const char *in_folder(char path[PATH_MAX], const char *name, const char *suffix)
{
    const char *folder = getenv("CANN_STUB_DIR");
    snprintf(path, PATH_MAX, "%s/%s%s", folder ? folder : "/dev/shm", name, suffix);
    return path;
}

static HcclResult publish(const char *name, const void *bytes, size_t size)
{
    char aside[PATH_MAX], path[PATH_MAX];
    int file = open(in_folder(aside, name, ".aside"), O_CREAT | O_WRONLY | O_TRUNC, 0600);
    if (file < 0)
        return HCCL_E_INTERNAL;
    for (size_t done = 0; done < size;) {
        ssize_t wrote = write(file, (const char *)bytes + done, size - done);
        if (wrote <= 0) {
            close(file);
            return HCCL_E_INTERNAL;
        }
        done += (size_t)wrote;
    }
    close(file);
    return rename(aside, in_folder(path, name, "")) ? HCCL_E_INTERNAL : HCCL_SUCCESS;
}

static void forget(const char *name)
{
    char path[PATH_MAX];
    unlink(in_folder(path, name, ""));
}

/* Read `size` bytes at `offset` of a file, once it is there. */
static HcclResult fetch(const char *name, void *into, size_t offset, size_t size)
{
    char path[PATH_MAX];
    const char *seconds = getenv("CANN_STUB_TIMEOUT");
    long tries = (seconds ? atol(seconds) : 60) * (1000000 / POLL);
    int file;
    while ((file = open(in_folder(path, name, ""), O_RDONLY)) < 0) {
        if (tries-- <= 0) {
            fprintf(stderr, "HCCL stub: nobody wrote %s\n", name);
            return HCCL_E_TIMEOUT;
        }
        usleep(POLL);
    }
    struct stat found;
    fstat(file, &found);
    if ((size_t)found.st_size < offset + size) {
        fprintf(stderr, "HCCL stub: %s holds %ld bytes, %zu are wanted\n", name, (long)found.st_size, offset + size);
        close(file);
        return HCCL_E_PARA;
    }
    for (size_t done = 0; done < size;) {
        ssize_t got = pread(file, (char *)into + done, size - done, (off_t)(offset + done));
        if (got <= 0) {
            close(file);
            return HCCL_E_INTERNAL;
        }
        done += (size_t)got;
    }
    close(file);
    return HCCL_SUCCESS;
}

/* --------------------------------------------------------------------------------------------------- one exchange */

static const char *share_of(char name[256], const Communicator *comm, uint64_t number, uint32_t rank)
{
    snprintf(name, 256, "%s.%lu.%u", comm->name, (unsigned long)number, rank);
    return name;
}

/* Begin the next collective with this rank's bytes. */
static HcclResult give(Communicator *comm, const void *bytes, size_t size)
{
    char name[256];
    return publish(share_of(name, comm, ++comm->collectives, comm->rank), bytes, size);
}

static HcclResult take(Communicator *comm, uint32_t rank, void *into, size_t offset, size_t size)
{
    char name[256];
    return fetch(share_of(name, comm, comm->collectives, rank), into, offset, size);
}

/* Every rank has begun this collective, so none still reads the files of the one before. */
static HcclResult end(Communicator *comm, HcclResult result)
{
    char name[256];
    for (uint32_t rank = 0; rank < comm->size && !result; rank++)
        result = take(comm, rank, NULL, 0, 0);
    forget(share_of(name, comm, comm->collectives - 1, comm->rank));
    return result;
}

/* ---------------------------------------------------------------------------------------------------- reductions */

static float from_bf16(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static uint16_t to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); /* to the nearest, ties to even */
}

#define SAME(value) (value)
#define REDUCTION(name, stored, computed, load, store)                                                                 \
    static void name(void *into, const void *more, uint64_t count, HcclReduceOp op)                                    \
    {                                                                                                                  \
        stored *left = into;                                                                                           \
        const stored *right = more;                                                                                    \
        for (uint64_t i = 0; i < count; i++) {                                                                         \
            computed a = load(left[i]), b = load(right[i]);                                                            \
            computed result = op == HCCL_REDUCE_SUM    ? a + b                                                         \
                              : op == HCCL_REDUCE_PROD ? a * b                                                         \
                              : op == HCCL_REDUCE_MAX  ? (a > b ? a : b)                                               \
                                                       : (a < b ? a : b);                                              \
            left[i] = store(result);                                                                                   \
        }                                                                                                              \
    }
REDUCTION(reduce_float, float, float, SAME, SAME)
REDUCTION(reduce_double, double, double, SAME, SAME)
REDUCTION(reduce_int64, int64_t, int64_t, SAME, SAME)
REDUCTION(reduce_int32, int32_t, int32_t, SAME, SAME)
REDUCTION(reduce_int8, int8_t, int8_t, SAME, SAME)
REDUCTION(reduce_uint8, uint8_t, uint8_t, SAME, SAME)
REDUCTION(reduce_bf16, uint16_t, float, from_bf16, to_bf16)
REDUCTION(reduce_half, _Float16, float, (float), (_Float16))

typedef void Reduction(void *, const void *, uint64_t, HcclReduceOp);

static Reduction *reduction(HcclDataType type)
{
    switch (type) {
    case HCCL_DATA_TYPE_FP32: return reduce_float;
    case HCCL_DATA_TYPE_FP64: return reduce_double;
    case HCCL_DATA_TYPE_INT64: return reduce_int64;
    case HCCL_DATA_TYPE_INT32: return reduce_int32;
    case HCCL_DATA_TYPE_INT8: return reduce_int8;
    case HCCL_DATA_TYPE_UINT8: return reduce_uint8;
    case HCCL_DATA_TYPE_BFP16: return reduce_bf16;
    case HCCL_DATA_TYPE_FP16: return reduce_half;
    default: return NULL;
    }
}

/* The sum of what all ranks gave, of `count` elements from byte `offset` on. */
static HcclResult sum(Communicator *comm, void *into, size_t offset, uint64_t count, HcclDataType type, HcclReduceOp op)
{
    Reduction *add = reduction(type);
    if (!add)
        return HCCL_E_NOT_SUPPORT;
    size_t size = count * width(type);
    char *total = malloc(size + 1), *share = malloc(size + 1);
    HcclResult result = take(comm, 0, total, offset, size);
    for (uint32_t rank = 1; rank < comm->size && !result; rank++) {
        result = take(comm, rank, share, offset, size);
        if (!result)
            add(total, share, count, op);
    }
    if (!result)
        memcpy(into, total, size);
    free(total);
    free(share);
    return result;
}

/* ------------------------------------------------------------------------------------------------- communicators */

HcclResult HcclGetRootInfo(HcclRootInfo *root)
{
    static int made;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    memset(root, 0, sizeof *root);
    snprintf(root->internal, 96, "hccl-%d-%d-%lx", getpid(), made++, now.tv_sec * 1000000000L + now.tv_nsec);
    return HCCL_SUCCESS;
}

static HcclResult join(const char *name, uint32_t size, uint32_t rank, HcclComm *made)
{
    if (size > RANKS)
        return HCCL_E_PARA;
    Communicator *comm = calloc(1, sizeof *comm);
    snprintf(comm->name, sizeof comm->name, "%s", name);
    comm->size = size;
    comm->rank = rank;
    *made = comm;
    return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo *root, uint32_t rank, HcclComm *made)
{
    return join(root->internal, size, rank, made);
}

HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo *root, uint32_t rank, const HcclCommConfig *config,
                                      HcclComm *made)
{
    (void)config;
    return join(root->internal, size, rank, made);
}

HcclResult HcclCreateSubCommConfig(HcclComm *parent, uint32_t size, uint32_t *ranks, uint64_t id, uint32_t rank,
                                   HcclCommConfig *config, HcclComm *made)
{
    (void)config;
    char name[96];
    snprintf(name, sizeof name, "%.60s-%lx-%u", ((Communicator *)*parent)->name, (unsigned long)id, ranks[0]);
    return join(name, size, rank, made);
}

HcclResult HcclCommDestroy(HcclComm handle)
{
    free(handle); /* its last file stays: a slower peer may still read it, and the folder is removed with the run */
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm handle, char *name)
{
    snprintf(name, 128, "%s", ((Communicator *)handle)->name);
    return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm handle, HcclResult *error)
{
    (void)handle;
    *error = HCCL_SUCCESS;
    return HCCL_SUCCESS;
}

const char *HcclGetErrorString(HcclResult result)
{
    return result == HCCL_E_TIMEOUT ? "HCCL stub: a peer did not come" : "HCCL stub: failed";
}

HcclResult HcclGetRankSize(HcclComm handle, uint32_t *size)
{
    *size = ((Communicator *)handle)->size;
    return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm handle, uint32_t *rank)
{
    *rank = ((Communicator *)handle)->rank;
    return HCCL_SUCCESS;
}

/* --------------------------------------------------------------------------------------------------- collectives */

HcclResult HcclBarrier(HcclComm handle, aclrtStream stream)
{
    (void)stream;
    return end(handle, give(handle, "", 0));
}

HcclResult HcclAllReduce(void *from, void *into, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm handle,
                         aclrtStream stream)
{
    (void)stream;
    HcclResult result = give(handle, from, count * width(type));
    return end(handle, result ? result : sum(handle, into, 0, count, type, op));
}

HcclResult HcclReduce(void *from, void *into, uint64_t count, HcclDataType type, HcclReduceOp op, uint32_t root,
                      HcclComm handle, aclrtStream stream)
{
    (void)stream;
    Communicator *comm = handle;
    HcclResult result = give(comm, from, count * width(type));
    if (!result && comm->rank == root)
        result = sum(comm, into, 0, count, type, op);
    return end(comm, result);
}

HcclResult HcclReduceScatter(void *from, void *into, uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm handle,
                             aclrtStream stream)
{
    (void)stream;
    Communicator *comm = handle;
    size_t size = count * width(type);
    HcclResult result = give(comm, from, size * comm->size);
    return end(comm, result ? result : sum(comm, into, size * comm->rank, count, type, op));
}

HcclResult HcclReduceScatterV(void *from, const void *counts, const void *offsets, void *into, uint64_t count,
                              HcclDataType type, HcclReduceOp op, HcclComm handle, aclrtStream stream)
{
    (void)stream;
    Communicator *comm = handle;
    const uint64_t *share = counts, *first = offsets;
    uint64_t total = 0;
    for (uint32_t rank = 0; rank < comm->size; rank++)
        total = first[rank] + share[rank] > total ? first[rank] + share[rank] : total;
    HcclResult result = give(comm, from, total * width(type));
    return end(comm, result ? result : sum(comm, into, first[comm->rank] * width(type), count, type, op));
}

HcclResult HcclAllGather(void *from, void *into, uint64_t count, HcclDataType type, HcclComm handle, aclrtStream stream)
{
    (void)stream;
    Communicator *comm = handle;
    size_t size = count * width(type);
    HcclResult result = give(comm, from, size);
    for (uint32_t rank = 0; rank < comm->size && !result; rank++)
        result = take(comm, rank, (char *)into + size * rank, 0, size);
    return end(comm, result);
}

HcclResult HcclAllGatherV(void *from, uint64_t count, void *into, const void *counts, const void *offsets,
                          HcclDataType type, HcclComm handle, aclrtStream stream)
{
    (void)stream;
    Communicator *comm = handle;
    const uint64_t *share = counts, *first = offsets;
    HcclResult result = give(comm, from, count * width(type));
    for (uint32_t rank = 0; rank < comm->size && !result; rank++)
        if (share[rank])
            result = take(comm, rank, (char *)into + first[rank] * width(type), 0, share[rank] * width(type));
    return end(comm, result);
}

HcclResult HcclBroadcast(void *buffer, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle,
                         aclrtStream stream)
{
    (void)stream;
    Communicator *comm = handle;
    size_t size = count * width(type);
    HcclResult result = give(comm, buffer, comm->rank == root ? size : 0);
    if (!result && comm->rank != root)
        result = take(comm, root, buffer, 0, size);
    return end(comm, result);
}

HcclResult HcclScatter(void *from, void *into, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle,
                       aclrtStream stream)
{
    (void)stream;
    Communicator *comm = handle;
    size_t size = count * width(type);
    HcclResult result = give(comm, from, comm->rank == root ? size * comm->size : 0);
    return end(comm, result ? result : take(comm, root, into, size * comm->rank, size));
}

HcclResult HcclAlltoAll(const void *from, uint64_t count, HcclDataType type, const void *into, uint64_t received,
                        HcclDataType received_type, HcclComm handle, aclrtStream stream)
{
    (void)received, (void)received_type, (void)stream;
    Communicator *comm = handle;
    size_t size = count * width(type);
    HcclResult result = give(comm, from, size * comm->size);
    for (uint32_t rank = 0; rank < comm->size && !result; rank++)
        result = take(comm, rank, (char *)into + size * rank, size * comm->rank, size);
    return end(comm, result);
}

HcclResult HcclAlltoAllV(const void *from, const void *counts, const void *offsets, HcclDataType type, const void *into,
                         const void *received, const void *received_offsets, HcclDataType received_type, HcclComm handle,
                         aclrtStream stream)
{
    (void)stream;
    Communicator *comm = handle;
    const uint64_t *share = counts, *first = offsets, *wanted = received, *at = received_offsets;
    size_t head = comm->size * sizeof(uint64_t), total = head; /* ahead of the bytes: where the share of each rank begins */
    for (uint32_t rank = 0; rank < comm->size; rank++)
        total += share[rank] * width(type);
    char *message = malloc(total);
    size_t place = head;
    for (uint32_t rank = 0; rank < comm->size; rank++) {
        size_t size = share[rank] * width(type);
        ((uint64_t *)message)[rank] = place;
        memcpy(message + place, (const char *)from + first[rank] * width(type), size);
        place += size;
    }
    HcclResult result = give(comm, message, total);
    free(message);
    for (uint32_t rank = 0; rank < comm->size && !result; rank++) {
        uint64_t begin;
        result = take(comm, rank, &begin, comm->rank * sizeof begin, sizeof begin);
        if (!result)
            result = take(comm, rank, (char *)into + at[rank] * width(received_type), begin,
                          wanted[rank] * width(received_type));
    }
    return end(comm, result);
}

/* ------------------------------------------------------------------------------------------------ point to point */

static const char *message(char name[256], const Communicator *comm, uint32_t from, uint32_t to, uint64_t number)
{
    snprintf(name, 256, "%s.from%uto%u.%lu", comm->name, from, to, (unsigned long)number);
    return name;
}

HcclResult HcclSend(void *from, uint64_t count, HcclDataType type, uint32_t to, HcclComm handle, aclrtStream stream)
{
    (void)stream;
    Communicator *comm = handle;
    char name[256];
    return publish(message(name, comm, comm->rank, to, comm->sent[to]++), from, count * width(type));
}

HcclResult HcclRecv(void *into, uint64_t count, HcclDataType type, uint32_t from, HcclComm handle, aclrtStream stream)
{
    (void)stream;
    Communicator *comm = handle;
    char name[256];
    message(name, comm, from, comm->rank, comm->received[from]++);
    HcclResult result = fetch(name, into, 0, count * width(type));
    forget(name);
    return result;
}

HcclResult HcclBatchSendRecv(HcclSendRecvItem *items, uint32_t count, HcclComm handle, aclrtStream stream)
{
    HcclResult result = HCCL_SUCCESS;
    for (uint32_t i = 0; i < count && !result; i++)
        if (items[i].sendRecvType == HCCL_SEND)
            result = HcclSend(items[i].buf, items[i].count, items[i].dataType, items[i].remoteRank, handle, stream);
    for (uint32_t i = 0; i < count && !result; i++)
        if (items[i].sendRecvType == HCCL_RECV)
            result = HcclRecv(items[i].buf, items[i].count, items[i].dataType, items[i].remoteRank, handle, stream);
    return result;
}
