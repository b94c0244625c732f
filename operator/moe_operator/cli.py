"""`moerator` and `kubectl moe`: one command line for a laptop and for a cluster.

Only arguments are read here; each command imports its own work, so that `--help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

EXIT_CODES = (
    "Exit codes: 0 done; 1 it ran and did not come out as wished; 2 the input is wrong; "
    "3 something needed is not there; 130 interrupted."
)

app = typer.Typer(
    help=f"Expert-aware Kubernetes for Mixture-of-Experts models.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Files = Annotated[
    list[str],
    typer.Option("--filename", "-f", metavar="FILE", help="File of resources, - for standard input; may be repeated."),
]
Run = Annotated[Path | None, typer.Option("--run", metavar="FOLDER", help="Run folder; by default the newest run.")]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the object.")]


@app.command()
def run(
    filename: Files,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the run folder (objects, logs) afterwards.")] = False,
) -> None:
    """Run resources on this machine: processes as pods, the same reconcile as on Kubernetes.

    Ends when every MoEJob and MoEDrill is over and there is no MoEService, or on Ctrl-C. No process stays behind.
    """
    from moe_operator.cli_run import run_files

    raise typer.Exit(run_files(filename, keep=keep))


@app.command()
def validate(filename: Files) -> None:
    """Check files of resources, as the API server would, without a cluster."""
    from moe_operator.cli_files import validate_files

    raise typer.Exit(validate_files(filename))


@app.command()
def plan(  # noqa: PLR0917  typer's way
    filename: Files,
    nodes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Nodes to place on, and pods there: what `kubectl get nodes,pods -A -o yaml` prints; - for stdin.",
        ),
    ] = None,
    load: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Routing trace to plan for: a file, or a folder that spec.trace recorded."),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="A..B", help="Other numbers of ranks: one, or a range that doubles.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw slots by rank, coloured by load, into this file.")
    ] = None,
) -> None:
    """Say what would come of resources before anything starts: placement, experts, bytes, memory, survival.

    Runs the same decisions as the operator; a ClusterTopology that they name must be in the files.
    """
    from moe_operator.cli_plan import show_plan

    raise typer.Exit(show_plan(filename, nodes=nodes, load=load, ranks=ranks, as_json=as_json, plot=plot))


@app.command()
def explain(
    filename: Files,
    nodes: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Nodes, and pods on them: what `kubectl get nodes,pods -A -o yaml` (or json) prints; - for stdin.",
        ),
    ],
    ranks: Annotated[
        str | None, typer.Option(metavar="A..B", help="Other numbers of ranks: one, or a range that doubles.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Say whether resources fit on these nodes; if not, why in numbers, and what would help.

    What does not fit: by domain of the required level the room there is, and
    what takes the rest. What would help: changes that were tried with the same
    placement, one at a time, the cheapest first. What fits: where, what would
    become of a lost rank, and how many more such gangs there is room for.

    A ClusterTopology that they name must be in the files. Exits with 1 if
    anything does not fit or is refused.
    """
    from moe_operator.cli_explain import show_explanation

    raise typer.Exit(show_explanation(filename, nodes=nodes, ranks=ranks, as_json=as_json))


@app.command()
def trace(  # noqa: PLR0917  typer's way
    path: Annotated[Path, typer.Argument(help="JSON lines in the fields of Megatron's tracer: a file, or a folder.")],
    ranks: Annotated[int, typer.Option(min=1, max=1024, help="Ranks to assign to.")] = 4,
    redundant: Annotated[int, typer.Option(min=0, max=4096, help="Redundant slots of each rank and layer.")] = 1,
    window: Annotated[int, typer.Option(min=1, help="Steps in one window.")] = 1,
    horizon: Annotated[float, typer.Option(min=0.001, help="Windows for which a load is believed to last.")] = 10.0,
    expert_bytes: Annotated[int, typer.Option(min=0, help="Bytes of one expert, for what moving it costs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Play a routing trace through ways of assigning experts: how even each keeps the ranks, and what it moves."""
    from moe_operator.cli_trace import show_trace

    raise typer.Exit(
        show_trace(
            path,
            ranks=ranks,
            redundant=redundant,
            window=window,
            horizon=horizon,
            expert_bytes=expert_bytes,
            as_json=as_json,
        )
    )


convert = typer.Typer(help="From one checkpoint to another.", no_args_is_help=True)
app.add_typer(convert, name="convert")


@convert.command("quantise")
def convert_quantise(  # noqa: PLR0917  typer's way
    source: Annotated[Path, typer.Argument(help="Folder of a safetensors checkpoint, its experts in full.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write; empty or not there.")],
    experts: Annotated[str, typer.Option(help="BFloat16, Float8, Int8 or Int4.")],
    group_size: Annotated[
        int | None, typer.Option(min=0, help="Numbers that share a scale, 0: a row. By default 64 for Int4, else 0.")
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Choose codes by what experts give on text: stdlib, or a folder of text."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=8, help="With --calibrate: rows that every expert is to be asked. 1024 by default."),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="With --calibrate: windows of text to read at most. 2048 by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Pack routed experts into fewer bits; everything else stays as it is. A MoEService serves the result."""
    from moe_operator.cli_convert import Text, quantise

    text = Text(calibrate, rows, windows)
    raise typer.Exit(quantise(source, destination, experts=experts, group_size=group_size, text=text, as_json=as_json))


@app.command()
def demo(
    examples: Annotated[Path, typer.Option(help="Folder with job-tiny, service-tiny and drill-tiny.yaml.")] = Path(
        "examples"
    ),
    output: Annotated[Path, typer.Option(help="File for the closing table as JSON.")] = Path(".moerator/demo.json"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the run folder (objects, logs) afterwards.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of a live display.")] = False,
) -> None:
    """Train a small model, serve it, kill a rank under load, and watch nothing fail; on this machine."""
    from moe_operator.demo import run_demo

    raise typer.Exit(run_demo(examples, output=output, keep=keep, plain=plain))


@app.command()
def drill(filename: Files, run: Run = None) -> None:
    """Injure a running service or job on purpose (MoEDrill) and report how it healed.

    The drill is applied to a local run that goes on; where there is none, with kubectl.
    """
    from moe_operator.cli_look import run_drill

    raise typer.Exit(run_drill(filename, run=run))


@app.command()
def apply(filename: Files, run: Run = None) -> None:
    """Create or change resources in a local run that goes on."""
    from moe_operator.cli_look import apply_files

    raise typer.Exit(apply_files(filename, run=run))


@app.command()
def delete(
    kind: Annotated[str, typer.Argument(help="Kind, plural or short name.")],
    name: Annotated[str, typer.Argument()],
    run: Run = None,
    namespace: Namespace = "default",
) -> None:
    """Delete a resource of a local run, with its pods."""
    from moe_operator.cli_look import delete_resource

    raise typer.Exit(delete_resource(kind, name, namespace=namespace, run=run))


@app.command()
def get(
    kind: Annotated[str, typer.Argument(help="Kind, plural or short name; moe for all, pods for pods.")] = "moe",
    run: Run = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Ask kubectl even if a local run goes on.")] = False,
    wide: Annotated[bool, typer.Option("--wide", "-w", help="More columns.")] = False,
) -> None:
    """List resources: of the local run that goes on, else with kubectl."""
    from moe_operator.cli_look import list_resources

    raise typer.Exit(list_resources(kind, run=run, cluster=cluster, wide=wide))


@app.command()
def status(
    kind: Annotated[str, typer.Argument(help="Kind, plural or short name.")],
    name: Annotated[str, typer.Argument()],
    run: Run = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Ask kubectl even if a local run goes on.")] = False,
    namespace: Namespace = "default",
) -> None:
    """Say how one resource is: its conditions, its ranks, its coverage."""
    from moe_operator.cli_look import show_status

    raise typer.Exit(show_status(kind, name, namespace=namespace, run=run, cluster=cluster))


@app.command()
def crds(
    write: Annotated[list[Path], typer.Option("--write", metavar="FOLDER", help="Write one file per kind here.")] = [],  # noqa: B006  typer's way
) -> None:
    """Print the custom resource definitions, or write them."""
    from moe_core.spec.crd import crd_files

    files = crd_files()
    for folder in write:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    if not write:
        typer.echo("---\n".join(files.values()), nl=False)


@app.command()
def operator() -> None:
    """Run the operator in a Kubernetes cluster: what its Deployment starts, told by MOERATOR_* variables."""
    from moe_operator.errors import BadSettings
    from moe_operator.main import run_operator
    from moe_operator.settings import OperatorSettings

    try:
        settings = OperatorSettings.from_environment()
    except BadSettings as problem:
        typer.echo(str(problem), err=True)
        raise typer.Exit(2) from problem
    run_operator(settings)


def main() -> None:
    """Entry point of both console scripts."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
