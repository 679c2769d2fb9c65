"""`parcelray bench`: benchmarks of speed and memory, each against a baseline measured in the same run."""

from typing import Annotated

import typer

from parcelray.cli.options import AsJson, integers, print_progress, show, show_report

bench_app = typer.Typer(no_args_is_help=True, help="Measure speed and memory against a baseline in the same run.")


@bench_app.command("train")
def bench_train(
    rounds: Annotated[int, typer.Option(min=1, help="Timed pairs of steps: training step and reference path.")] = 7,
    with_ray: Annotated[
        bool, typer.Option("--ray", help="Also compare Ray Train with the loop in this process.")
    ] = False,
    steps: Annotated[int, typer.Option(min=4, help="With --ray: training steps per measured run.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="With --ray: number of pairs of runs.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure a bf16 training step against torch's fused attention on one thread; with --ray also Ray Train."""
    from parcelray.bench.measure import Report
    from parcelray.bench.train import bench_step, bench_training

    report = bench_step(rounds=rounds)
    if with_ray:
        report = Report(report.measures + bench_training(steps=steps, repeats=repeats).measures, report.machine)
    show_report(report, as_json)


@bench_app.command("evaluate")
def bench_evaluate(
    samples: Annotated[
        int, typer.Option(min=256, help="Number of samples of the comparison with a plain loop.")
    ] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds per comparison.")] = 3,
    small: Annotated[
        int,
        typer.Option(
            min=500, help="Number of samples of the smaller of two evaluations whose peak memory is measured."
        ),
    ] = 5000,
    large: Annotated[
        int, typer.Option(min=1000, help="Number of samples of the larger of the two evaluations.")
    ] = 20000,
    as_json: AsJson = False,
) -> None:
    """Measure one pass for all budgets, shared images, Ray Data against a plain loop, and peak memory."""
    from parcelray.bench.evaluate import bench_evaluation

    show_report(bench_evaluation(samples=samples, repeats=repeats, memory_samples=(small, large)), as_json)


@bench_app.command("tune")
def bench_tune(
    samples: Annotated[int, typer.Option(min=1, help="Number of questions per family of the mini suite.")] = 25,
    steps: Annotated[
        int, typer.Option(min=2, help="Steps of the training whose overhead as a search trial is measured.")
    ] = 60,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds per comparison.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure a split search in warm actors against one process per point, and the overhead of a training trial."""
    from parcelray.bench.tune import bench_tuning

    show_report(bench_tuning(samples=samples, steps=steps, repeats=repeats, say=print_progress), as_json)


@bench_app.command("serve")
def bench_serve(
    requests: Annotated[int, typer.Option(min=32, help="Number of requests per load test with 32 clients.")] = 192,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds per comparison.")] = 3,
    port: Annotated[int, typer.Option(help="TCP port on the loopback address.")] = 18462,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compute threads of the model, the same for all compared servers; default: PyTorch's default.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the model: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure the endpoint against offline batches, a minimal FastAPI server and fixed budgets."""
    from parcelray.bench.serve import bench_serving

    show_report(bench_serving(requests=requests, repeats=repeats, port=port, threads=threads, device=device), as_json)


@bench_app.command("connector")
def bench_connector(
    backbone: Annotated[
        str, typer.Option(help="Backbone: mini, paligemma2-3b or llava-1.5-7b (both need a GPU), or a folder.")
    ] = "mini",
    resolution: Annotated[
        int | None, typer.Option(help="Image side in pixels; default: that of the backbone.", show_default=False)
    ] = None,
    budgets: Annotated[str, typer.Option(help="Budgets (visual tokens per image), separated by commas.")] = "16,64,256",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    repeats: Annotated[int, typer.Option(min=2, help="Timed rounds per measure.")] = 10,
    device: Annotated[str, typer.Option(help="Device of the model: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure time and memory of each connector, and its share of the prefill, by budget."""
    from parcelray.bench.connector import bench_connectors

    report = bench_connectors(
        backbone,
        integers(budgets, "--budgets"),
        batch_size=batch_size,
        repeats=repeats,
        device=device,
        resolution=resolution,
    )
    show_report(report, as_json)


@bench_app.command("kmeans")
def bench_kmeans(
    widths: Annotated[str, typer.Option(help="Token widths (dimensions), separated by commas.")] = "1024,4096",
    clusters: Annotated[str, typer.Option(help="Numbers of clusters, separated by commas.")] = "32,64,128",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes (images), separated by commas.")] = "1,8,32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds per measure.")] = 3,
    device: Annotated[str, typer.Option(help="Device of the model: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure K-means of visual tokens against scikit-learn and three other libraries."""
    from parcelray.bench.kmeans import bench_kmeans

    report = bench_kmeans(
        widths=integers(widths, "--widths"),
        clusters=integers(clusters, "--clusters"),
        batch_sizes=integers(batch_sizes, "--batch-sizes"),
        repeats=repeats,
        device=device,
        say=print_progress,
    )
    show_report(report, as_json)


@bench_app.command("overhead")
def bench_overhead(
    backbone: Annotated[
        str, typer.Option(help="Backbone: laptop, llava-1.5-7b or paligemma2-3b (both need a GPU), mini, or a folder.")
    ] = "laptop",
    budgets: Annotated[str, typer.Option(help="Budgets (visual tokens per image), separated by commas.")] = "144,64",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes (images), separated by commas.")] = "1,4",
    reducers: Annotated[
        str | None, typer.Option(help="Names of reducers, separated by commas; default: all.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds per measure.")] = 5,
    resolution: Annotated[
        int | None, typer.Option(help="Image side in pixels; default: that of the backbone.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the model: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure the time of each training-free reducer against the prefill time that it saves."""
    from parcelray.bench.overhead import REDUCERS, bench_overhead

    report = bench_overhead(
        budgets=integers(budgets, "--budgets"),
        batch_sizes=integers(batch_sizes, "--batch-sizes"),
        reducers=list(REDUCERS) if reducers is None else reducers.split(","),
        repeats=repeats,
        backbone=backbone,
        resolution=resolution,
        device=device,
        say=print_progress,
    )
    show_report(report, as_json)


@bench_app.command("intervals")
def bench_intervals(
    replicates: Annotated[int, typer.Option(min=100, help="Number of simulated data sets per setting.")] = 4000,
    clusters: Annotated[
        str, typer.Option(help="Answers within a cluster: beta (beta-binomial) or copies (some repeat one answer).")
    ] = "beta",
    as_json: AsJson = False,
) -> None:
    """Measure the coverage of the 95 % intervals of scores by simulation, and the rejected true nulls."""
    from parcelray.bench.intervals import bench_intervals, parse_model

    show(bench_intervals(replicates, parse_model(clusters), say=print_progress), as_json, lambda value: value.to_rich())
