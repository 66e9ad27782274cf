"""The commands."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from lapora._version import __version__
from lapora.cli.evaluate import compare_command, eval_command
from lapora.cli.lines import binary_lines
from lapora.cli.options import (
    AdapterArgument,
    BaseModelOption,
    BatchOption,
    DataDirOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    NameOption,
    OutputDirOption,
    QuantizeOption,
    SamplesOption,
    SeedOption,
    TaskOption,
    TrustOption,
    model_settings,
)
from lapora.cli.output import RowProgress, complain, json_text, say, write_json_lines
from lapora.config import (
    DataSettings,
    Engine,
    FisherType,
    FitSettings,
    Link,
    OnError,
    Optimizer,
    PredictSettings,
    PriorMethod,
    PriorSettings,
    PriorStructure,
    Structure,
    Subset,
    WeightSharing,
)
from lapora.errors import LaporaError, LaporaWarning, UsageError

app = typer.Typer(
    name="lapora",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Calibrated probabilities for LoRA fine-tuned language models, by the Laplace approximation.",
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Calibrated probabilities for LoRA fine-tuned language models, by the Laplace approximation."""
    if version:
        typer.echo(f"lapora {__version__}")
        raise typer.Exit


@app.command("fit")
def fit_command(
    adapter: AdapterArgument,
    task: TaskOption = None,
    data_dir: DataDirOption = None,
    split: Annotated[str, typer.Option(help="Split the adapter was trained on.")] = "train",
    limit: LimitOption = None,
    structure: Annotated[Structure, typer.Option(help="Shape of the curvature.")] = FitSettings.structure,
    weight_sharing: Annotated[
        WeightSharing, typer.Option(help="KFAC for shared weights; asdl is the paper's stack.")
    ] = FitSettings.weight_sharing,
    engine: Annotated[Engine, typer.Option(help="Who computes it; two are laplace-torch's.")] = FitSettings.engine,
    subset: Annotated[Subset, typer.Option(help="Which weights are Bayesian.")] = FitSettings.subset,
    fisher: Annotated[FisherType, typer.Option(help="Which Fisher.")] = FitSettings.fisher,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank kept, of kron's wide sides or of lowrank.")] = None,
    name: NameOption = "default",
    base_model: BaseModelOption = None,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    batch_size: BatchOption = "auto",
    trust_remote_code: TrustOption = False,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens per row.")] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Wrap prompts as a chat.")] = False,
    seed: SeedOption = 0,
    output_dir: OutputDirOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a posterior of that name.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what a fit that was ended has saved.")] = False,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between saves for --resume; 0: every batch.")] = (
        FitSettings.save_every
    ),
) -> None:
    """Fit the Laplace posterior of ADAPTER on the rows it was trained on."""
    model = model_settings(adapter, base_model, quantize, dtype, device, batch_size, output_dir, trust_remote_code)
    if task is None:
        raise UsageError("--data is missing: a built-in task (see `lapora tasks`) or the path of a task YAML")
    from lapora.workflows.fit import fit

    with RowProgress("fit") as progress:
        result = fit(
            model,
            DataSettings(task, data_dir, split, limit),
            FitSettings(
                structure=structure,
                weight_sharing=weight_sharing,
                engine=engine,
                subset=subset,
                fisher=fisher,
                rank=rank,
                name=name,
                max_length=max_length,
                chat_template=chat_template,
                seed=seed,
                overwrite=overwrite,
                resume=resume,
                save_every=save_every,
            ),
            progress,
        )
    for note in result.notes:
        say(f"note: {note}")
    if result.truncated:
        say(f"{result.truncated} of {result.rows} rows were cut to the greatest length")
    if result.log_likelihood is None:
        say("rows without labels: the evidence is known only up to a constant, which does not move the prior")
    say(
        f"posterior over {result.parameters:,} parameters from {result.rows:,} rows, prior precision "
        f"{result.prior.prior.describe()} by marginal likelihood: {result.folder}"
    )
    if result.kept < 1:
        say(f"the basis keeps {result.kept:.1%} of the curvature's trace; the rest keeps the prior")


@app.command("tune-prior")
def tune_prior_command(
    adapter: AdapterArgument,
    name: NameOption = "default",
    method: Annotated[PriorMethod, typer.Option(help="How it is chosen.")] = PriorSettings.method,
    prior: Annotated[PriorStructure, typer.Option(help="One precision, or one per kind or layer.")] = (
        PriorSettings.structure
    ),
    optimizer: Annotated[
        Optimizer, typer.Option(help="Of the marginal likelihood; adam is the paper's.")
    ] = PriorSettings.optimizer,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of adam.")] = PriorSettings.learning_rate,
    steps: Annotated[int, typer.Option(min=1, help="Steps of adam.")] = PriorSettings.steps,
    link: Annotated[Link, typer.Option(help="Link to tune for, by validation.")] = PriorSettings.link,
    task: TaskOption = None,
    data_dir: DataDirOption = None,
    split: Annotated[str | None, typer.Option(help="Split with validation rows.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Validation rows to use; half of the split.")] = None,
    base_model: BaseModelOption = None,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    batch_size: BatchOption = "auto",
    trust_remote_code: TrustOption = False,
    seed: SeedOption = 0,
    output_dir: OutputDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Choose the prior precision: by validation rows where there are some, else by the marginal likelihood."""
    model = model_settings(adapter, base_model, quantize, dtype, device, batch_size, output_dir, trust_remote_code)
    from lapora.workflows.tune_prior import tune_prior

    settings = PriorSettings(name, method, prior, optimizer, lr, steps, link, seed)
    with RowProgress("tune-prior") as progress:
        tuned = tune_prior(model, DataSettings(task, data_dir, split, limit), settings, progress)
    if as_json:
        typer.echo(json.dumps(tuned.prior))
    say(tuned.reason)
    for note in tuned.notes:
        say(note)


@app.command("predict")
def predict_command(
    adapter: AdapterArgument,
    source: Annotated[str, typer.Argument(metavar="[INPUT|-]", help="JSON lines; - is standard input.")] = "-",
    output: Annotated[str, typer.Option("--output", "-o", help="File to write; - is standard output.")] = "-",
    name: NameOption = "default",
    link: Annotated[Link, typer.Option(help="How logit moments become probabilities.")] = PredictSettings.link,
    samples: SamplesOption = PredictSettings.samples,
    logits: Annotated[bool, typer.Option("--logits", help="Add the logits' mean and covariance.")] = False,
    on_error: Annotated[OnError, typer.Option(help="What a bad line does.")] = PredictSettings.on_error,
    abstain_below: Annotated[float | None, typer.Option(min=0, max=1, help="Mark less confident rows.")] = None,
    base_model: BaseModelOption = None,
    quantize: QuantizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = "auto",
    batch_size: BatchOption = "auto",
    trust_remote_code: TrustOption = False,
    seed: SeedOption = 0,
    output_dir: OutputDirOption = None,
) -> None:
    """Predict, one JSON line out per JSON line in."""
    model = model_settings(adapter, base_model, quantize, dtype, device, batch_size, output_dir, trust_remote_code)
    from lapora.workflows.predict import predict

    settings = PredictSettings(name, link, samples, seed, logits, on_error, abstain_below)
    with binary_lines(source) as lines:
        write_json_lines(predict(model, settings, lines), output)


app.command("eval")(eval_command)
app.command("compare")(compare_command)


@app.command("tasks")
def tasks_command(
    name: Annotated[str | None, typer.Argument(help="Print this task's YAML.")] = None,
    check: Annotated[str | None, typer.Option(metavar="TASK", help="Show what a task makes of rows.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter to check the task with.")] = None,
    data_dir: DataDirOption = None,
    split: Annotated[str | None, typer.Option(help="Split to check.")] = None,
    limit: LimitOption = None,
    base_model: BaseModelOption = None,
) -> None:
    """List the built-in tasks, print one as YAML to start your own from, or check one on rows."""
    if check is not None:
        if adapter is None:
            raise UsageError("--check needs --adapter, whose tokenizer and kind decide what a row becomes")
        from lapora.workflows.check_task import check as check_rows

        report = check_rows(adapter, DataSettings(check, data_dir, split, limit), base_model=base_model)
        typer.echo(json_text(report, indent=2))
        return
    from lapora.tasks import builtin_tasks, builtin_yaml, describe_task, load_task

    if name is not None:
        if name not in builtin_tasks():
            raise UsageError(f"{name}: no such built-in task; there are {', '.join(builtin_tasks())}")
        typer.echo(builtin_yaml(name), nl=False)
        return
    from lapora.report import print_tasks

    print_tasks([describe_task(load_task(each)) for each in builtin_tasks()])


@app.command("inspect")
def inspect_command(
    adapter: AdapterArgument,
    name: NameOption = "default",
    output_dir: OutputDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what the saved posterior is."""
    from lapora.posterior.artifact import SavedPosterior, posterior_folder

    manifest: dict[str, Any] = SavedPosterior(posterior_folder(output_dir or Path(adapter), name)).manifest
    if as_json:
        typer.echo(json.dumps(manifest))
        return
    from lapora.report import print_manifest

    print_manifest(manifest)


@app.command("demo")
def demo_command(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where the demo's files go.")] = Path(
        "lapora-demo"
    ),
) -> None:
    """Build a small base model, adapter and data offline, and run the whole pipeline on them."""
    from lapora.report import print_evaluation
    from lapora.workflows.demo import run_demo

    record = run_demo(directory, say)
    print_evaluation(record)
    say(f"the files stay in {directory}; try: lapora eval {directory}/adapter --link mc-joint --link probit")


INTERRUPTED = 130
"""What Typer makes of Ctrl-C."""


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Lapora's own warnings are lines for people; a library's are no news for them."""
    if issubclass(category, LaporaWarning):
        say(f"warning: {message}")


def run() -> None:
    """Run the command line and end the process with the promised status."""
    warnings.simplefilter("once", LaporaWarning)
    warnings.showwarning = _show_warning
    try:
        # Without its standalone mode Typer returns an exit status instead of ending the process.
        status = app(standalone_mode=False)
    except LaporaError as error:
        complain(str(error))
        sys.exit(error.exit_status)
    except typer.TyperException as error:
        # `lapora` alone has printed its help already, and has no message.
        if message := getattr(error, "format_message", error.__str__)().strip():
            complain(f"{message} (see --help)")
        sys.exit(UsageError.exit_status)
    if status == INTERRUPTED:
        complain("interrupted")
    sys.exit(status if isinstance(status, int) else 0)
