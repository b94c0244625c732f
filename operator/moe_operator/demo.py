"""The demo: train, serve, kill a rank under load, watch nothing fail. Everything in it is the product's own.

The same resources as on Kubernetes, from the examples folder; the same reconcile; real processes; a real SIGKILL sent
by a MoEDrill. Exit code 0 only if no request failed, every expert has a live copy again, and the generalist beat
dropping.
"""

import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import typer

from moe_core.contract.exchange import RuntimeState
from moe_core.contract.expert_map import ExpertMap
from moe_core.manifests.map_slices import map_of_slices
from moe_core.outcome import MoeratorError
from moe_operator.cli_files import EXIT_MISSING, read_files
from moe_operator.cli_run import EXIT_FAILED, EXIT_INTERRUPTED, ConditionTeller, condition, outcome_of
from moe_operator.cluster import local_init
from moe_operator.cluster.local_shell import LocalShell
from moe_operator.cluster.protocol import Key
from moe_operator.demo_report import Figures, Loss, Quality, print_table, write_json
from moe_operator.load_generator import LoadGenerator
from moe_operator.progress import Screen, make_screen

STAGES = ("train", "serve", "kill a rank", "measure")
CALM_S = 6.0
"""Seconds of load before the fault and after the cure, so that the two can be told apart."""
CLIENTS = 8
"""Requests in flight: two for each rank, so that the one that dies surely holds some."""
MOST_WORKERS = 4
"""That score the checkpoint side by side: each has the model for itself."""
READY_WITHIN_S, DRILL_WITHIN_S = 300.0, 180.0
WORTH_TELLING = frozenset(
    [("Accepted", "False"), ("Placed", "True"), ("Complete", "True"), ("Failed", "True"), ("Injected", "True")]
    + [(kind, status) for kind in ("Ready", "ExpertCoverage", "Degraded") for status in ("True", "False")]
)
FAILED_FOLDER = "failed-run"
T = TypeVar("T")


class DemoFailed(MoeratorError):
    """A stage did not come out as it must."""


def run_demo(examples: Path, *, output: Path, keep: bool, plain: bool) -> int:
    names = [str(examples / f"{name}-tiny.yaml") for name in ("job", "service", "drill")]
    if missing := [name for name in names if not Path(name).is_file()]:
        typer.echo(f"{missing[0]} is missing; run this in the checkout or give --examples", err=True)
        return EXIT_MISSING
    job, service, drill = (read_files([name])[0].raw for name in names)
    screen = make_screen(STAGES, plain=plain)
    demo = Demo(screen, job=job, service=service, drill=drill)
    try:
        with screen:
            figures = asyncio.run(demo.run(keep=keep, aside=output.parent / FAILED_FOLDER))
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo("stopped; no process is left", err=True)
        return EXIT_INTERRUPTED
    except DemoFailed as failed:
        typer.echo(f"the demo failed: {failed}", err=True)
        return EXIT_FAILED
    print_table(figures, screen.console)
    write_json(figures, output)
    screen.console.print(f"the same as JSON: {output}", highlight=False)
    return 0 if figures.kept_its_promise else EXIT_FAILED


class Demo:
    def __init__(
        self, screen: Screen, *, job: Mapping[str, Any], service: Mapping[str, Any], drill: Mapping[str, Any]
    ) -> None:
        self._screen = screen
        self._view = screen.view
        self._documents = {"job": job, "service": service, "drill": drill}
        self._teller = ConditionTeller(started_at=screen.started_at)
        self._figures = Figures()

    async def run(self, *, keep: bool, aside: Path) -> Figures:
        async with LocalShell(keep=keep) as shell:
            try:
                await self._timed("train", self._train(shell))
                await self._timed("start serving", self._serve(shell))
                await self._timed("serve and heal", self._hurt(shell))
            except DemoFailed as failed:
                keep_evidence(shell.cluster.folder, aside)
                raise DemoFailed(f"{failed}\nlogs are in {aside}") from failed
        await self._timed("measure", self._measure(Path(self._documents["service"]["spec"]["model"]["path"])))
        self._figures.parts_s["total"] = time.monotonic() - self._screen.started_at
        return self._figures

    async def _timed(self, part: str, work: Awaitable[None]) -> None:
        started = time.monotonic()
        await work
        self._figures.parts_s[part] = time.monotonic() - started

    async def _train(self, shell: LocalShell) -> None:
        self._screen.stage(0)
        document = self._documents["job"]
        key = shell.apply(document)
        bound = document["spec"]["training"]

        def look(state: RuntimeState | None) -> None:
            training = state.training if state else None
            if training is None:
                self._view.headline = f"starting {document['spec']['parallelism']['expert']} ranks"
                return
            figures, facts = self._figures, self._view.facts
            figures.note_training(training)
            shares = [training.step / bound["maxSteps"]] if bound.get("maxSteps") else []
            shares += [training.seconds / bound["maxSeconds"]] if bound.get("maxSeconds") else []
            self._view.fraction = max(shares)
            self._view.headline = f"training on the source of Python's standard library, step {training.step}"
            facts["tokens/s"] = f"{training.tokens_per_s:,.0f}"
            if state is not None and state.step_time is not None:
                facts["a step's time"] = state.step_time.told()
            if training.loss is not None:
                facts["loss"] = f"{training.loss:.3f}"
                self._view.sample("loss over time", training.loss)
            if training.heldout_bits_per_byte is not None:
                facts["held-out bits per byte"] = f"{training.heldout_bits_per_byte:.3f}"
            if training.order2_bits_per_byte is not None:
                facts["order-2 model's"] = f"{training.order2_bits_per_byte:.3f}"

        if not await self._until(shell, key, look, outcome_of):
            raise DemoFailed(f"{key}: {condition(self._thing(shell, key), 'Failed').get('message', 'not accepted')}")
        self._view.ranks = ()

    async def _serve(self, shell: LocalShell) -> None:
        self._screen.stage(1)
        key = shell.apply(self._documents["service"])

        def look(state: RuntimeState | None) -> None:
            active = sum(rank.phase == "Active" for rank in state.ranks) if state else 0
            self._view.headline = f"starting the service: {active} of {len(state.ranks) if state else 0} ranks active"

        async with within(READY_WITHIN_S, f"{key} ready"):
            await self._until(shell, key, look, lambda thing: condition(thing, "Ready").get("status") == "True" or None)

    async def _hurt(self, shell: LocalShell) -> None:
        """Load, calm, fault, cure, calm; the load is stopped in the end and every request gets its answer."""
        drill = self._documents["drill"]
        target = drill["spec"]["target"]
        service = Key("MoEService", "default", target["name"])
        loss = what_dies(map_of(shell, service), target["rank"])
        self._figures.loss = loss
        if not (loss.copied and loss.uncopied):
            raise DemoFailed(f"rank {target['rank']} must hold experts with and without a copy elsewhere: {loss}")
        url = f"http://127.0.0.1:{shell.cluster.port_of(service, 'gateway')}/v1"
        self._screen.news(f"the OpenAI API answers at {url}")
        load = LoadGenerator(url, model=self._served_name(), clients=CLIENTS)
        sending = asyncio.create_task(load.run(), name="load")
        showing = asyncio.create_task(self._show_load(shell, service, load), name="show load")
        try:
            self._view.headline = "steady requests, half of them streaming"
            await asyncio.sleep(CALM_S)
            self._figures.calm_tokens_per_s = load.tokens_per_s(window_s=CALM_S)
            self._screen.stage(2)
            self._view.headline = f"rank {target['rank']} is killed with SIGKILL under load"
            key = shell.apply(drill)
            async with within(DRILL_WITHIN_S, f"{key} over"):
                await self._until(shell, key, lambda _: None, outcome_of)
            self._figures.note_drill(self._thing(shell, key))
            async with within(READY_WITHIN_S, f"{service} ready again"):
                await self._until(
                    shell, service, lambda _: None, lambda t: condition(t, "Ready").get("status") == "True" or None
                )
            self._view.headline = "healed; requests go on"
            await asyncio.sleep(CALM_S)
            self._figures.healed_tokens_per_s = load.tokens_per_s(window_s=CALM_S)
        finally:
            load.stop()
            showing.cancel()
        await sending
        face = shell.cluster.state_of(service)
        self._figures.note_service(self._thing(shell, service), face.state if face else None)
        self._figures.note_load(load.tally)

    async def _show_load(self, shell: LocalShell, service: Key, load: LoadGenerator) -> None:
        while True:
            face, tally, facts = shell.cluster.state_of(service), load.tally, self._view.facts
            state = face.state if face else None
            facts["requests"] = f"{tally.sent} sent, {tally.ok} ok, {tally.failed} failed, {tally.in_flight} in flight"
            self._view.sample("tokens/s", load.tokens_per_s(window_s=3.0))
            if state is not None:
                self._view.ranks = state.ranks
                if state.step_time is not None:
                    facts["a step's time"] = state.step_time.told()
                if state.coverage is not None:
                    facts["experts with a live copy"] = f"{state.coverage.covered} of {state.coverage.total}"
                if state.serving is not None:
                    facts["tokens degraded"] = f"{sum(state.serving.degraded_tokens.values())}"
                    facts["requests continued elsewhere"] = f"{state.serving.requests_replayed}"
            self._tell(self._thing(shell, service))
            self._screen.refresh()
            await asyncio.sleep(0.5)

    async def _measure(self, checkpoint: Path) -> None:
        self._screen.stage(3)
        loss = self._figures.loss
        assert loss is not None
        experts = sorted({expert for _, expert in loss.uncopied})
        self._view.headline = f"held-out bits per byte, whole and without experts {experts}"
        self._screen.news(self._view.headline)
        data = self._documents["job"]["spec"]["training"]["data"]
        program = ["-m", "moe_runtime.train.evaluate", str(checkpoint)]
        program += ["--data", data.get("path") or "stdlib"]
        program += ["--lost", ",".join(f"{layer}:{expert}" for layer, expert in loss.uncopied)]
        program += ["--workers", str(min(os.cpu_count() or 1, MOST_WORKERS))]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", local_init.__file__),
            *(sys.executable, *program),
            stdin=asyncio.subprocess.PIPE,  # closes when we die, and then it dies
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # so small a model is quicker with one thread in an operation
        )
        try:
            said, complained = await asyncio.gather(_all_of(process.stdout), _all_of(process.stderr))
            await process.wait()
        finally:
            if process.returncode is None and process.stdin is not None:
                process.stdin.close()
                await process.wait()
        if process.returncode != 0:
            raise DemoFailed(f"{' '.join(program)} ended with {process.returncode}: {complained.decode()[-2000:]}")
        self._figures.quality = Quality.parse(said.decode())

    async def _until(
        self,
        shell: LocalShell,
        key: Key,
        look: Callable[[RuntimeState | None], None],
        done: Callable[[dict[str, Any]], T | None],
    ) -> T:
        """Follow one resource until `done` has an answer; tell every turn of its conditions."""
        while True:
            thing = self._thing(shell, key)
            self._tell(thing)
            face = shell.cluster.state_of(key)
            state = face.state if face else None
            if state is not None:
                self._view.ranks = state.ranks
            look(state)
            self._screen.refresh()
            answer = done(thing)
            if answer is not None:
                return answer
            if outcome_of(thing) is False:
                raise DemoFailed(f"{key}: {thing['status'].get('message', '')}")
            await shell.changed()

    def _tell(self, thing: dict[str, Any]) -> None:
        """Only the turns that a person watching wants to hear of."""
        for c in self._teller.turns(thing):
            if (c["type"], c["status"]) in WORTH_TELLING:
                name = f"{thing['kind']}/{thing['metadata']['name']}"
                self._screen.news(f"{name} {c['type']}={c['status']} {c['reason']}: {c['message']}")

    def _thing(self, shell: LocalShell, key: Key) -> dict[str, Any]:
        thing = shell.cluster.resource(key)
        if thing is None:
            raise DemoFailed(f"{key} was deleted meanwhile")
        return thing

    def _served_name(self) -> str:
        service = self._documents["service"]
        return str(service["spec"]["model"].get("servedName") or service["metadata"]["name"])


async def _all_of(stream: asyncio.StreamReader | None) -> bytes:
    return b"" if stream is None else await stream.read()


@contextlib.asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """A stage that takes longer has failed."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise DemoFailed(f"{what}: not within {seconds:.0f} s") from error


def map_of(shell: LocalShell, service: Key) -> ExpertMap:
    """The assignment in force, from the service's ExpertMap objects."""
    expert_map = map_of_slices(
        [
            thing["spec"]
            for thing in shell.cluster.objects("ExpertMap")
            if thing["metadata"]["labels"].get("moerator.dev/owner-name") == service.name
            and thing["metadata"]["labels"].get("moerator.dev/owner-kind") == service.kind
        ]
    )
    if expert_map is None:
        raise DemoFailed(f"{service} has no ExpertMap")
    return expert_map


def what_dies(expert_map: ExpertMap, rank: int) -> Loss:
    """(layer, logical expert) pairs that `rank` holds, by whether another rank holds one too."""
    copied: list[tuple[int, int]] = []
    uncopied: list[tuple[int, int]] = []
    own = expert_map.slot_range(rank)
    for layer_idx in range(expert_map.num_layers):
        for expert, slots in enumerate(expert_map.slots_of_logical(layer_idx)):
            if any(slot in own for slot in slots):
                (copied if any(slot not in own for slot in slots) else uncopied).append((layer_idx, expert))
    return Loss(tuple(copied), tuple(uncopied))


def keep_evidence(run: Path, aside: Path) -> None:
    """Copy logs and objects of a run that failed, before its folder goes."""
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for log in [*run.glob("*.log"), *run.glob("logs/*.log"), *run.glob("p/*/log")]:
        shutil.copy(log, aside / (f"{log.parent.name}.log" if log.name == "log" else log.name))
    if (run / "objects").is_dir():
        shutil.copytree(run / "objects", aside / "objects")
