"""The demo: the main job on the embedded default, from nothing to a report."""

from __future__ import annotations

import time
from pathlib import Path

from fourmill.config import Config, load_config
from fourmill.errors import WorkMissing
from fourmill.flows import flow_runs
from fourmill.flows.progress import console, progress, say
from fourmill.flows.report import ReportResult, make_report, numbers_table
from fourmill.flows.status import status, status_report
from fourmill.shards.dataset import Dataset


def run_demo(overrides: list[str], out: Path, *, use_prefect: bool = True) -> None:
    """Build, train, report, and say what was made and where. Whatever is finished already is not done again."""
    started = time.monotonic()
    config = load_config("demo", overrides)
    content = config.model_dump(mode="json")
    say(f"1/3 build {config.dataset}: {len(config.modalities)} modalities, {config.source.kind} source")
    problem: WorkMissing | None = None
    try:
        flow_runs.run_flow(flow_runs.build_dataset, use_prefect=use_prefect, config=content)
    except WorkMissing as error:
        problem = error
    _show_status(config)
    if problem is not None:
        raise problem
    say(f"2/3 train {out}: preset {config.train.preset}, {config.train.steps} steps")
    run = flow_runs.run_flow(flow_runs.train, use_prefect=use_prefect, config=content, out=str(out))
    say("3/3 report on held-out samples that neither fitting nor training has seen")
    made = write_report(config.dataset, out)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    say(f"done in {minutes} min {seconds} s")
    say(f"  dataset  {config.dataset}   (fourmill status {config.dataset})")
    say(f"  model    {run['checkpoint']}   (step {run['step']}, loss {run['loss']:.3f})")
    say(f"  report   {made.path}   (open it in a browser)")


def write_report(
    dataset: str, model: Path | None, *, samples: int = 8, metric_samples: int = 128
) -> ReportResult:
    """Make the report with a progress bar, and print its numbers."""
    with progress("Report", "samples") as advance:
        made = make_report(dataset, model, samples=samples, metric_samples=metric_samples, progress=advance)
    console.print(numbers_table(made.numbers))
    return made


def _show_status(config: Config) -> None:
    console.print(status_report(status(Dataset(config.dataset)), config.dataset), soft_wrap=True)
