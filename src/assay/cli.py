"""The command line: list, show, run, compare, report. Words in, calls out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from assay import catalogue

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Published learning methods, each a drop-in PyTorch piece, each tested against its own claim.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="A glob such as '*adam*', or a word.")] = "*",
    family: Annotated[str, typer.Option(help="Only this family: optim, nn, losses, data ...")] = "",
    seam: Annotated[str, typer.Option(help=f"Only this seam: {', '.join(catalogue.SEAMS)}.")] = "",
    kind: Annotated[str, typer.Option(help=f"Only this kind: {', '.join(catalogue.KINDS)}.")] = "",
) -> None:
    """The methods, one line each."""
    found = catalogue.search(pattern, family=family, seam=seam, kind=kind)
    if not found:
        raise ValueError(f"no method matches {pattern!r} with these filters; 'assay list' shows all")
    if not sys.stdout.isatty():
        for card in found:
            typer.echo(f"{card.id}\t{card.family}\t{card.seam or card.kind}\t{card.name}: {card.claim}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "family", "seam", "what its paper claims", box=None, header_style="bold", pad_edge=False)
    for card in found:
        table.add_row(f"[bold]{card.id}[/]", card.family, card.seam or card.kind, card.claim)
    Console().print(table)


@app.command()
def show(method: Annotated[str, typer.Argument(help="A method's id, as 'assay list' prints it.")]) -> None:
    """A method's card: what it does, how to use it, what was found."""
    from rich.console import Console
    from rich.markdown import Markdown

    card = catalogue.find(method)
    console = Console()
    console.print(f"[bold]{card.id}[/] · {card.family} · {card.kind}" + (f" · {card.seam}" if card.seam else ""))
    console.print(f"{card.paper} ({card.authors}, {card.year}), arXiv {card.arxiv}", highlight=False)
    console.print("public: " + ", ".join(card.paths), highlight=False)
    for option, sampler in card.space.items():
        kind = next(name for name in sampler if name != "default")
        console.print(f"tunable: {option} = {sampler['default']} ({kind} {sampler[kind]})", highlight=False)
    console.print(Markdown(card.body))


@app.command()
def run(
    method: Annotated[str, typer.Argument(help="A method's id.")],
    record: Annotated[bool, typer.Option("--record", help="Write evidence.json into the method's folder.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run: few seeds, short; never recorded.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the figure.")] = Path("assay-out"),
) -> None:
    """Test a method against its paper's claim: rows, checks with intervals, a verdict, a figure."""
    if record and quick:
        raise ValueError("--quick cannot be recorded: its verdict means nothing")
    from assay.bench import claims

    card = catalogue.find(method)
    typer.echo(f"{card.id}: {card.claim}\n")
    with _bar(f"measuring {card.id}") as advance:
        evidence = claims.run_claim(card, quick=quick, jobs=jobs, progress=advance)
    _print_evidence(evidence)
    figure = claims.draw(card, evidence, out / f"{card.id}.png")
    typer.echo(f"\nfigure: {figure}")
    if record:
        command = " ".join(["assay run", card.id, "--record", *([f"--jobs {jobs}"] if jobs > 1 else [])])
        typer.echo(f"recorded: {claims.record(card, evidence, command)}")
    if quick:
        typer.echo("(a quick run: its verdict means nothing)")


@app.command()
def compare(
    methods: Annotated[
        str, typer.Option(help="Comma-separated: adamp, 'adamp(delta=0.05)', adamp+ps-kd; or all of them.")
    ] = "all",
    task: Annotated[str, typer.Option(help="digits, tabular, text, 'text(length=32)' or FILE.py:NAME.")] = "digits",
    family: Annotated[str, typer.Option(help="With --methods all: only this family.")] = "",
    baseline: Annotated[str, typer.Option(help="Measured against: adamw, sgd or a method.")] = "adamw",
    trials: Annotated[int, typer.Option(help="Tuning runs for each, the baseline included; 0: defaults only.")] = 5,
    seeds: Annotated[int, typer.Option(help="Fresh paired seeds to report on.")] = 5,
    steps: Annotated[int | None, typer.Option(help="Training steps a run; the task's own by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step; the task's own by default.")] = None,
    select: Annotated[str, typer.Option(help="Pick trials by their 'final' or 'best' validation value.")] = "final",
    equal_seconds: Annotated[bool, typer.Option(help="Also compare at equal training time.")] = True,
    engine: Annotated[str, typer.Option(help="local, sequential, ray or dask.")] = "local",
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes at a time; all cores by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder of records and report; finished runs are reused.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write settings, table and curves as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
) -> None:
    """Give methods the same budget on a task and say which of them really helps."""
    from assay.bench.protocol import compare as compare_

    if methods == "all":
        cards = [card for card in catalogue.search(family=family) if card.seam]
        methods = ",".join(card.id for card in cards)
    folder = out or Path("assay-out") / "".join(c if c.isalnum() else "-" for c in Path(task).name).strip("-")
    with _watch() as progress:
        result = compare_(
            task,
            methods,
            baseline=baseline,
            trials=trials,
            seeds=seeds,
            steps=steps,
            batch_size=batch_size,
            select=select,
            equal_seconds=equal_seconds,
            engine=engine,
            jobs=jobs,
            device=device,
            records=folder / "records.jsonl",
            progress=progress,
        )
    _finish(result, folder, json, csv)
    if result.interrupted:
        typer.echo("Interrupted: what was finished is shown; the same command goes on from here.", err=True)
        raise typer.Exit(130)
    if not result.table[0]["seeds"]:
        raise typer.Exit(1)  # without a baseline nothing was compared; the table says why


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that 'assay compare' wrote.")],
    json: Annotated[Path | None, typer.Option(help="Also write settings, table and curves as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the table as CSV.")] = None,
) -> None:
    """Make table and report anew from the records of a comparison."""
    from assay.bench.comparison import load

    _finish(load(folder), folder, json, csv)


def _finish(result: Any, folder: Path, json: Path | None, csv: Path | None) -> None:
    from assay.bench.terminal import print_comparison

    print_comparison(result)
    for path in (folder / "report.html", json, csv):
        if path is not None:
            typer.echo(f"{path.suffix[1:]:>6}: {result.save(path)}")


def _print_evidence(evidence: Any) -> None:
    from assay.bench.terminal import print_evidence

    print_evidence(evidence)


def _bar(title: str) -> Any:
    from assay.bench.terminal import bar

    return bar(title)


def _watch() -> Any:
    from assay.bench.terminal import watch

    return watch()


def main() -> None:
    """Entry point: what the user can mend is said in one sentence, and the exit status is 2."""
    try:
        app()
    except (ValueError, ImportError, OSError) as error:
        typer.echo(f"assay: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("assay: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
