"""`moerator convert`: the runtime does it, in a process of its own, for it has torch and this has not."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from moe_core.contract.packing import BITS, SCALED
from moe_operator.cli_files import EXIT_INVALID

EXIT_MISSING = 3
MEBI = 1 << 20


@dataclass(frozen=True, slots=True)
class Text:
    """Options of the command, None where not given: what codes are chosen by."""

    calibrate: str | None
    rows: int | None
    windows: int | None


def quantise(
    source: Path, destination: Path, *, experts: str, group_size: int | None, text: Text, as_json: bool
) -> int:
    """Run the converter and say what became of it. Returns the exit code."""
    refused = _refused(experts, group_size) or _refused_text(text) or _refused_folders(source, destination)
    if refused:
        typer.echo(refused, err=True)
        return EXIT_INVALID
    program = [sys.executable, "-m", "moe_runtime.convert.quantise", str(source), str(destination)]
    program += ["--experts", experts]
    for name, value in {**asdict(text), "group-size": group_size}.items():
        program += [f"--{name}", str(value)] if value is not None else []
    try:
        done = subprocess.run(program, capture_output=True, text=True, check=False)
    except OSError as error:
        typer.echo(f"{program[0]}: {error}", err=True)
        return EXIT_MISSING
    lines = done.stderr.strip().splitlines()
    if done.returncode != 0:
        if "No module named" in done.stderr and "moe_runtime" in done.stderr:
            typer.echo("convert needs the runtime: install moerator[runtime]", err=True)
            return EXIT_MISSING
        typer.echo(lines[-1] if lines else f"ended with {done.returncode}", err=True)
        return EXIT_INVALID
    if as_json:
        typer.echo(done.stdout, nl=False)
        return 0
    _print(json.loads(done.stdout), destination)
    return 0


def _refused(experts: str, group_size: int | None) -> str:
    if experts not in BITS or experts == "Float32":
        return f"--experts must be BFloat16, Float8, Int8 or Int4 (got {experts})"
    if group_size is not None and experts not in SCALED:
        return f"--group-size: {experts} has no scales (got {group_size})"
    return ""


def _refused_text(text: Text) -> str:
    """Before the model is loaded and minutes of text are read."""
    for name, value in {"--rows": text.rows, "--windows": text.windows}.items():
        if value is not None and text.calibrate is None:
            return f"{name} {value} means nothing without --calibrate"
    if text.calibrate not in {None, "stdlib"} and not Path(text.calibrate or "").is_dir():
        return f"--calibrate must be stdlib or a folder of text (got {text.calibrate})"
    return ""


def _refused_folders(source: Path, destination: Path) -> str:
    if not (source / "config.json").is_file():
        return f"source must be the folder of a checkpoint: {source} holds no config.json"
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        return f"destination must be an empty folder or not there (got {destination})"
    return ""


def _print(converted: dict[str, Any], destination: Path) -> None:
    console = Console(soft_wrap=True, highlight=False)
    full, packed = converted["full_bytes"], converted["packed_bytes"]
    console.print(f"{destination}: experts as {converted['experts']}, {converted['calibration'] or 'without text'}")
    console.print(f"experts: {full / MEBI:.1f} MiB in Float32, {packed / MEBI:.1f} MiB packed ({full / packed:.1f}x)")
    caption = "weights: squared error over square"
    if converted["layers"]:
        caption += "; output: the same of what they give; nearest: that of nearest codes\n"
        caption += "rows: of the expert asked least; filled: experts that were given rows of other tokens"
    table = Table(caption=caption, caption_justify="left")
    layers = converted["layers"]
    more = ("output", "nearest", "rows", "filled", "codes") if layers else ()
    for name in ("layer", "weights", *more):
        table.add_column(name, no_wrap=True)
    for layer_idx, error in enumerate(converted["errors"]):
        row = [str(layer_idx), f"{error:.2e}"]
        if layers:
            layer = layers[layer_idx]
            row += [f"{layer['output_error_chosen']:.2e}", f"{layer['output_error_nearest']:.2e}"]
            row += [str(layer["least_own_rows"]), str(layer["experts_filled_up"])]
            row.append(", ".join(f"{way} {count}" for way, count in layer["ways"].items()))
        table.add_row(*row)
    console.print(table)
