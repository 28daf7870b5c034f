"""What the Triton kernels compile to, for GPUs that this machine need not have: `make aot`.

python -m bench.triton_aot bench/results/triton_aot.md

Every kernel, in every configuration that may be chosen, with and without the options that make its body longer, for
compute capability 8.0 (A100), 9.0 (H100) and 10.0 (B200). Fails if one spills registers, or if a product of bfloat16 does not
use the matrix instruction of its architecture.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tbrm_kernels.backends.triton import dlogits, exp_rows, exps, forward, launch, logit_rows, multiply, segments

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_KIB = {8: 163, 9: 227, 10: 227}  # that a program may have, by NVIDIA's CUDA programming guide
MATRIX_INSTRUCTIONS = {8: "mma.sync", 9: "wgmma", 10: "tcgen05"}
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    kernel: Any
    options: str
    types: dict[str, str]
    """Of the arguments, where they are not float32 vectors or 32-bit integers; "" for None."""
    constants: dict[str, Any]
    warps: int
    stages: int = 1
    product: torch.dtype | None = None
    """Of the operands, in a kernel that multiplies matrices."""
    tile: str = ""


FLOATS = {name: "fp32" for name in ("inner", "outer", "factor", "beta")}
INTEGERS = (
    "T",
    "V",
    "D",
    "N",
    "stride_hidden",
    "stride_weight",
    "stride_out",
    "stride_values",
    "stride_scaled",
    "splits",
    "group",
    "tiles",
    "first_v",
    "width",
    "ignore_index",
    "out_stride",
)
OPTIONAL = ("bias", "inverse_temperature", "weighted", "entropy", "entropy_out", "grad_entropy", "ref_values")
PLAIN = dict.fromkeys(OPTIONAL, "")
OPTIONS = (  # and the types that they have; whether logits are capped
    ("", PLAIN, False),
    ("bias, soft-cap, entropy", {"bias": "*bf16", "inverse_temperature": ""}, True),
)


def cases(major: int) -> Iterator[Case]:
    for dtype, name in TYPES.items():
        with_bias = {"bias": f"*{name}", "inverse_temperature": ""}
        wide = launch.WIDE_CONFIGS.get((major, dtype), ())
        for config in wide + launch.CONFIGS[major, dtype]:
            for kernel in (forward.forward_kernel, dlogits.dlogits_kernel):
                for options, types, capped in OPTIONS[: 1 if config in wide else None]:
                    types = operands(major, name, config) | {"out": f"*{name}"} | types
                    yield tiled(kernel, options, types, capped, dtype, config)
        row = {"targets": "*i64", "out": f"*{name}"}
        for options, types, capped in (("", PLAIN, False), ("bias, soft-cap, entropy", with_bias, True)):
            constants = {"CAPPED": capped, "BLOCK": logit_rows.BLOCK}
            for kernel in (logit_rows.row_stats_kernel, logit_rows.row_dlogits_kernel):
                yield Case(kernel, ", ".join(filter(None, [name, options])), row | types, constants, logit_rows.WARPS)
    yield from exp_cases(major)
    for options, types in (("", PLAIN), ("entropy", {})):
        combine = {"targets": "*i64"} | types
        yield Case(forward.combine_kernel, options, combine, {"BLOCK": forward.COMBINE_BLOCK}, forward.COMBINE_WARPS)
    for name in TYPES.values():
        types = {"values": f"*{name}", "factor": "*fp32", "size": "i64"}
        yield Case(multiply.multiply_kernel, name, types, {"BLOCK": multiply.BLOCK}, multiply.WARPS)
    nothing = PLAIN | {"lse": "", "grad_lse": ""}
    for kernel in (segments.residual_kernel, segments.residual_grad_kernel):
        for bounds in ("i32", "i64"):
            for options, types in (("calibrated", {}), ("sums", nothing)):
                segment = {"cu_seqlens": f"*{bounds}"} | types
                yield Case(kernel, f"{options}, {bounds}", segment, {"BLOCK": segments.BLOCK}, segments.WARPS)


def exp_cases(major: int) -> Iterator[Case]:
    """The kernels that take exponentials relative to a known number: bfloat16 alone."""
    for keep, (options, types, capped) in product((True, False), OPTIONS):
        config = launch.of_exps(launch.EXP_CONFIGS[major, not options], keep=keep)
        again = replace(config, block_t=config.block_t // 2)
        for kernel, its in ((exps.exp_kernel, config), (exps.exp_again_kernel, again)):
            blocks = f"tensordesc<bf16[{its.block_t}, {its.block_v}]>" if major >= 9 else "*bf16"
            of_kernel = operands(major, "bf16", its) | types | {"out": blocks if keep else ""}
            name = ", ".join(filter(None, ["kept" if keep else "scoring", options]))
            case = tiled(kernel, name, of_kernel, capped, torch.bfloat16, its)
            flat = {"FLATTEN": its.flatten} if kernel is exps.exp_kernel else {}
            yield replace(case, constants=case.constants | flat)
    row = {"targets": "*i64"} | dict.fromkeys(("values", "hidden", "weight", "scaled"), "*bf16")
    for options, types, capped in OPTIONS:
        constants = {"CAPPED": capped, "BLOCK": exps.ROW_BLOCK}
        yield Case(exps.target_kernel, options, row | types, constants, exps.ROW_WARPS)
        constants = {"CAPPED": capped, "BLOCK": exp_rows.BLOCK}
        yield Case(exp_rows.exp_rows_kernel, options, row | types, constants, exp_rows.WARPS)
    for options, types in (("", PLAIN), ("entropy", {})):
        constants = {"BLOCK_T": exps.SUMS_ROWS, "BLOCK_TILES": exps.SUMS_TILES}
        types = {"targets": "*i64", "unfit_out": "*i8"} | types
        yield Case(exps.sums_kernel, options, types, constants, exps.SUMS_WARPS)


def operands(major: int, name: str, config: launch.TileConfig) -> dict[str, str]:
    blocks = {"hidden": (config.block_t, config.block_d), "weight": (config.block_v, config.block_d)}
    if major < 9:
        return {matrix: f"*{name}" for matrix in blocks}
    return {matrix: f"tensordesc<{name}[{rows}, {columns}]>" for matrix, (rows, columns) in blocks.items()}


def tiled(
    kernel: Any, options: str, types: dict[str, str], capped: bool, dtype: torch.dtype, config: launch.TileConfig
) -> Case:
    constants = {
        "CAPPED": capped,
        "FACTOR": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
        "BLOCK_T": config.block_t,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
    }
    types = {"targets": "*i64", "unfit": "*i8"} | types
    tile = f"{config.block_t} x {config.block_v} x {config.block_d}"
    return Case(kernel, options, types, constants, config.warps, config.stages, dtype, tile)


def compile_(case: Case, capability: int) -> Any:
    signature, constants, attributes = {}, dict(case.constants), {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif (type_ := case.types.get(name, FLOATS.get(name, "i32" if name in INTEGERS else "*fp32"))) == "":
            signature[name], constants[name] = "constexpr", None
        else:
            signature[name] = type_
            aligned = type_.startswith("*") or name == "D" or name.startswith("stride_")
            if aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack and local memory (to which registers spill) of a thread, and shared memory of a program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def row_of(case: Case, capability: int) -> tuple[list[Any], list[str]]:
    """The table's row, and what is wrong with the case."""
    compiled = compile_(case, capability)
    used = resources(compiled.asm["cubin"])
    spilled = used["STACK"] + used["LOCAL"]
    shared = compiled.metadata.shared / 1024
    found = [
        name
        for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
        if re.search(rf"\b{name}\b", compiled.asm["ptx"])
    ]
    instruction = found[0] if found else ""
    wrong = []
    if spilled:
        wrong.append(f"spills {spilled} bytes a thread")
    if shared > SHARED_KIB[capability // 10]:
        wrong.append(f"needs {shared:.0f} KiB of shared memory")
    if case.product == torch.bfloat16 and not instruction.startswith(MATRIX_INSTRUCTIONS[capability // 10]):
        wrong.append(f"multiplies by {instruction or 'no matrix instruction'}")
    name = case.kernel.fn.__name__.removesuffix("_kernel")
    dtype = TYPES[case.product] if case.product else ""
    cells = [f"{capability / 10}", name, dtype, case.options, case.tile, case.warps, case.stages, used["REG"], spilled]
    return [*cells, f"{shared:.0f}", instruction], wrong


def main() -> None:
    header = ["capability", "kernel", "dtype", "options", "tile T x V x D", "warps", "stages"]
    header += ["registers", "spilled bytes", "shared KiB", "matrix instruction"]
    todo = [(case, capability) for capability in (80, 90, 100) for case in cases(capability // 10)]
    table, failures = [], []
    for case, capability in tqdm(todo, desc="compiling", disable=None):
        cells, wrong = row_of(case, capability)
        table.append(cells)
        failures += [f"{' | '.join(map(str, cells))}: {what}" for what in wrong]
    lines = [" | ".join(map(str, cells)) for cells in (header, ["---"] * len(header), *table)]
    text = f"""# The Triton kernels, compiled ahead of time

`make aot`, Triton {triton.__version__}, with its own ptxas. The first configuration of a kernel is the default, the
others are tried with `TBRM_AUTOTUNE=1`. Registers are per thread; shared memory is per program.

"""
    Path(sys.argv[1]).write_text(text + "".join(f"| {line} |\n" for line in lines))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
