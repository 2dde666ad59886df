"""Builds every kernel's default configurations, for GPUs that need not be present, and prints what became of them.

    python tests/support/ahead_of_time.py > report.json

It runs in a process of its own, because the other kernel tests use Triton's interpreter, which compiles nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from patchkernels.kernels import cross_entropy, patch_embedding, scaling, targets

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("bf16", "fp32")


def cross_entropy_cases() -> dict[str, tuple]:
    """By name: kernel, types of its pointers and scalars, values of its constexprs, and num_warps."""
    cases = {}
    for dtype in DTYPES:
        torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        softcap_kinds = {"plain": 0, "all": cross_entropy.softcap_kind(30.0, torch_dtype)}
        for vocab in (512, 50257, 128256):
            for passes in ("loss", "gradient", "both"):
                for option in ("plain", "all"):
                    rows, row_bytes = 10**6, (2 if dtype == "bf16" else 4) * vocab
                    programs = cross_entropy.programs_at_a_time(rows, row_bytes, 2 if passes == "both" else 1, True)
                    config = cross_entropy.launch_config(vocab, rows, programs)
                    signature = dict.fromkeys(("logits_ptr", "dlogits_ptr"), "*" + dtype) | {
                        "target_ptr": "*i64",
                        "c_ptr": "*fp32",
                        "losses_ptr": "*fp32",
                        "statistics_ptr": "*fp32",
                    }
                    signature |= dict.fromkeys(
                        ("N", "logits_stride", "dlogits_stride", "first", "V", "vocab", "readable", "ignore_index"),
                        "i32",
                    )
                    signature |= dict.fromkeys(("label_smoothing", "softcap", "z_loss_weight"), "fp32")
                    constants = {
                        "SLOTS": 4,
                        "BLOCK_K": 4,
                        "NEEDS_LOSS": passes != "gradient",
                        "NEEDS_GRAD": passes != "loss",
                        "SMOOTHING": option == "all",
                        "SOFTCAP": softcap_kinds[option],
                        "BLOCK_V": config["BLOCK_V"],
                    }
                    cases[f"cross_entropy-{dtype}-{vocab}-{passes}-{option}"] = (
                        cross_entropy.patch_cross_entropy_kernel,
                        signature,
                        constants,
                        config["num_warps"],
                    )
        for option in ("plain", "all"):
            config = cross_entropy.launch_config(1024, 1, 1)
            constants = {"SLOTS": 4, "BLOCK_K": 4, "SMOOTHING": option == "all", "SOFTCAP": softcap_kinds[option]}
            cases[f"slice_statistics-{dtype}-1024-{option}"] = (
                cross_entropy.slice_statistics_kernel,
                {
                    "logits_ptr": "*" + dtype,
                    "target_ptr": "*i64",
                    "statistics_ptr": "*fp32",
                    "picked_ptr": "*fp32",
                    **dict.fromkeys(("logits_stride", "first", "V", "readable", "ignore_index"), "i32"),
                    "softcap": "fp32",
                },
                {**constants, "BLOCK_V": config["BLOCK_V"]},
                config["num_warps"],
            )
    return cases


def patch_embedding_cases() -> dict[str, tuple]:
    cases = {}
    for dtype in DTYPES:
        for hidden in (128, 4096):
            config = patch_embedding.launch_config(hidden)
            warps = config.pop("num_warps")
            shared = {
                "SLOTS": 4,
                "BLOCK_T": patch_embedding.BLOCK_T,
                "TILE_T": patch_embedding.TILE_T,
                "PADDING": True,
                **config,
            }
            for padding in (False, True):
                cases[f"patch_embedding-{dtype}-{hidden}-padding={padding}"] = (
                    patch_embedding.patch_embedding_kernel,
                    {
                        "ids_ptr": "*i64",
                        "weight_ptr": "*" + dtype,
                        "out_ptr": "*" + dtype,
                        **dict.fromkeys(("weight_stride", "V", "D", "padding_idx"), "i32"),
                    },
                    {"SLOTS": 4, "UNROLL": 4, "PADDING": padding, **config},
                    warps,
                )
            pointers = {
                "order_ptr": "*i64",
                "scale_ptr": "*fp32",
                "block_sums_ptr": "*fp32",
                "grad_ptr": "*" + dtype,
            }
            sizes = dict.fromkeys(("grad_stride", "D"), "i32")
            cases[f"block_sums-{dtype}-{hidden}"] = (
                patch_embedding.patch_embedding_block_sums_kernel,
                {**pointers, "ordered_ptr": "*i32", **sizes},
                shared,
                warps,
            )
            segments = {**pointers, "segments_ptr": "*i64", **sizes, "V": "i32", "padding_idx": "i32"}
            for add, out in ((False, dtype), (True, dtype), (True, "fp32")):
                cases[f"backward-{dtype}-{hidden}" + (f"-added-to-{out}" if add else "")] = (
                    patch_embedding.patch_embedding_backward_kernel,
                    {**segments, "out_ptr": "*" + out},
                    {**shared, "IDS": patch_embedding.IDS, "ADD": add},
                    warps,
                )
    return cases


def small_cases() -> dict[str, tuple]:
    cases = {}
    for dtype in DTYPES:
        for in_place in (False, True):
            cases[f"scale-{dtype}-in_place={in_place}"] = (
                scaling.scale_kernel,
                {"values_ptr": "*" + dtype, "scale_ptr": "*fp32", "out_ptr": "*" + dtype, "elements": "i32"},
                {"IN_PLACE": in_place, "BLOCK": scaling.BLOCK},
                scaling.NUM_WARPS,
            )
    for slots in (1, 4, 17):
        config = targets.launch_config(slots)
        warps = config.pop("num_warps")
        for reduction in targets.REDUCTIONS.values():
            cases[f"coefficients-{slots}-{reduction}"] = (
                targets.target_coefficients_kernel,
                {
                    "target_ptr": "*i64", "kept_ptr": "*i64", "weight_ptr": "*fp32", "c_ptr": "*fp32",
                    "N": "i32", "ignore_index": "i32", "weight_stride": "i32",
                },
                {"SLOTS": slots, "WEIGHTED": True, "REDUCTION": reduction, "EVERY_LOSS": False, **config},
                warps,
            )  # fmt: skip
    cases["weighted_sum"] = (
        targets.weighted_sum_kernel,
        {"losses_ptr": "*fp32", "c_ptr": "*fp32", "total_ptr": "*fp32", "elements": "i32"},
        {"BLOCK": targets.BLOCK},
        targets.NUM_WARPS,
    )
    return cases


CASES = {**cross_entropy_cases(), **patch_embedding_cases(), **small_cases()}


def build(name: str, target: str):
    kernel, types, constants, warps = CASES[name]
    names = kernel.arg_names
    assert set(names) == set(types) | set(constants), "the kernel's signature and this test disagree"
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    # Triton's launcher finds that pointers, strides and sizes are divisible by 16 if tensors are aligned.
    aligned = [n for n in types if n.endswith(("_ptr", "_stride")) or n in ("V", "D", "readable")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    # As it is launched: the backward of patch embedding has no fused multiply-adds where rows are narrow.
    summed = (patch_embedding.patch_embedding_block_sums_kernel, patch_embedding.patch_embedding_backward_kernel)
    fused = kernel not in summed or constants["BLOCK_D"] >= patch_embedding.UNSHARED_BLOCK_D
    options = {"num_warps": warps, "enable_fp_fusion": fused}
    return triton.compile(source, target=TARGETS[target], options=options)


def spilled_bytes(built, target: str, folder: Path) -> int:
    if target == "gfx942":
        text = built.asm["amdgcn"]
        return sum(int(n) for n in re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text))
    binary = folder / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([cuobjdump, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    assert found, usage
    return sum(int(n) for n in found)


def report() -> dict[str, dict]:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in CASES:
            for target in TARGETS:
                built = build(name, target)
                ptx = built.asm.get("ptx", "")
                results[f"{name}-{target}"] = {
                    "spilled_bytes": spilled_bytes(built, target, Path(folder)),
                    "shared_bytes": built.metadata.shared,
                    "threads": built.metadata.num_warps * TARGETS[target].warp_size,
                    "vector_loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)),
                    "vector_stores": len(re.findall(r"st\.global[.\w:]*\.v4\.b32", ptx)),
                }
    return results


if __name__ == "__main__":
    print(json.dumps(report(), indent=1))
