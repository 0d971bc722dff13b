"""The kernels that one decoder layer launches, forward and back, as torch_npu's own C++ calls them.

python -m tests.ascend.layers LIBRARIES      prints, as JSON, the names of each kind of layer
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.ascend import cann

SIZES: dict[str, dict[str, Any]] = {
    "dense": {"preset": "llama3.1-8b", "num_key_value_heads": 2, "head_dim": 64},
    "qk norm": {"preset": "qwen3-8b", "num_key_value_heads": 2, "head_dim": 64},
    "latent": {
        "preset": "deepseek-v2-lite",
        "num_key_value_heads": 4,
        "first_k_dense_replace": 2,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
    },
}


def main(libraries: str) -> None:
    folder = Path(libraries)
    cann.load(folder, operators=True)
    import torch

    from mindspeed_core.device import Device
    from mindspeed_core.models.families import family_of, preset
    from mindspeed_core.parallel.mesh import Mesh, ParallelConfig

    launches = cann.Launches(folder)
    mesh = Mesh.create(ParallelConfig(), Device.open("npu"))
    from mindspeed_core.models import rope
    from mindspeed_core.models.attention import AttentionPlan
    from mindspeed_core.models.build import build_model

    found = {}
    for name, sizes in SIZES.items():
        config = {
            **preset(sizes["preset"]),
            "num_hidden_layers": 2,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_attention_heads": 4,
            "vocab_size": 128,
            **{key: value for key, value in sizes.items() if key != "preset"},
        }
        arch = family_of(config).architecture(config)
        (model,) = build_model(arch, mesh, precision="bf16")
        hidden = torch.empty(16, 1, 256, dtype=torch.bfloat16, device="npu", requires_grad=True)
        positions = torch.arange(16, device="npu")[None]
        plan = AttentionPlan(*rope.angles(positions, model.rope_inverse, model.rope_factor, torch.bfloat16))
        blocks: Any = model.decoder.layers
        for layer in blocks:  # the first one makes what all share
            launches.take()
            out, _ = layer(hidden, attention_mask=None, packed_seq_params=plan)
            forward = launches.take()
            grad = torch.empty_like(out)
            launches.take()
            out.backward(grad)
            found[name] = {"forward": forward, "backward": launches.take()}
    print(json.dumps(found))
    mesh.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
