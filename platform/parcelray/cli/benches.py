"""`parcelray bench`: measures, side by side in one run."""

from typing import Annotated

import typer

from parcelray.cli.options import AsJson, integers, show_report, tell

bench_app = typer.Typer(no_args_is_help=True, help="Measure, side by side in one run.")


@bench_app.command("train")
def bench_train(
    steps: Annotated[int, typer.Option(min=4, help="Steps per measured run.")] = 40,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Steps per second of Ray Train with one worker over the same loop in this process."""
    from parcelray.bench.train import bench_training

    show_report(bench_training(steps=steps, repeats=repeats), as_json)


@bench_app.command("evaluate")
def bench_evaluate(
    samples: Annotated[int, typer.Option(min=256, help="Samples of the comparison with a plain loop.")] = 2048,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each comparison.")] = 3,
    small: Annotated[
        int, typer.Option(min=500, help="Samples of the smaller evaluation whose memory is measured.")
    ] = 5000,
    large: Annotated[int, typer.Option(min=1000, help="Samples of the larger one.")] = 20000,
    as_json: AsJson = False,
) -> None:
    """All budgets in one pass, shared images, Ray Data against a plain loop, and peak memory."""
    from parcelray.bench.evaluate import bench_evaluation

    show_report(bench_evaluation(samples=samples, repeats=repeats, memory_samples=(small, large)), as_json)


@bench_app.command("tune")
def bench_tune(
    samples: Annotated[int, typer.Option(min=1, help="Questions per family of the mini suite.")] = 25,
    steps: Annotated[
        int, typer.Option(min=2, help="Steps of the training whose overhead as a trial is measured.")
    ] = 60,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each comparison.")] = 3,
    as_json: AsJson = False,
) -> None:
    """A split search in warm actors against a process per point, and a training trial against its bare training."""
    from parcelray.bench.tune import bench_tuning

    show_report(bench_tuning(samples=samples, steps=steps, repeats=repeats, say=tell), as_json)


@bench_app.command("serve")
def bench_serve(
    requests: Annotated[int, typer.Option(min=32, help="Requests of each load at 32 clients.")] = 192,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each comparison.")] = 3,
    port: Annotated[int, typer.Option(help="Port on the loopback.")] = 18462,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the model's arithmetic, on every side.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """The endpoint against offline batches, a plain server and fixed budgets."""
    from parcelray.bench.serve import bench_serving

    show_report(bench_serving(requests=requests, repeats=repeats, port=port, threads=threads, device=device), as_json)


@bench_app.command("connector")
def bench_connector(
    backbone: Annotated[
        str, typer.Option(help="mini, paligemma2-3b or llava-1.5-7b (need a GPU), or a folder.")
    ] = "mini",
    resolution: Annotated[int | None, typer.Option(help="Image side in pixels.", show_default=False)] = None,
    budgets: Annotated[str, typer.Option(help="Visual tokens per image, separated by commas.")] = "16,64,256",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    repeats: Annotated[int, typer.Option(min=2, help="Measured rounds.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time and memory of each connector, and its share of the prefill, by budget."""
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
    widths: Annotated[str, typer.Option(help="Widths of the tokens, separated by commas.")] = "1024,4096",
    clusters: Annotated[str, typer.Option(help="Numbers of clusters, separated by commas.")] = "32,64,128",
    batch_sizes: Annotated[str, typer.Option(help="Images at a time, separated by commas.")] = "1,8,32",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Our K-means for visual tokens beside scikit-learn's and three other libraries'."""
    from parcelray.bench.kmeans import bench_kmeans

    report = bench_kmeans(
        widths=integers(widths, "--widths"),
        clusters=integers(clusters, "--clusters"),
        batch_sizes=integers(batch_sizes, "--batch-sizes"),
        repeats=repeats,
        device=device,
        say=tell,
    )
    show_report(report, as_json)


@bench_app.command("overhead")
def bench_overhead(
    backbone: Annotated[
        str, typer.Option(help="laptop, llava-1.5-7b or paligemma2-3b (need a GPU), mini, or a folder.")
    ] = "laptop",
    budgets: Annotated[str, typer.Option(help="Visual tokens, separated by commas.")] = "144,64",
    batch_sizes: Annotated[str, typer.Option(help="Images at a time, separated by commas.")] = "1,4",
    reducers: Annotated[
        str | None, typer.Option(help="Reducers, separated by commas; all by default.", show_default=False)
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    resolution: Annotated[int | None, typer.Option(help="Image side in pixels.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """What each training-free reduction costs against what the shorter prompt saves."""
    from parcelray.bench.overhead import REDUCERS, bench_overhead

    report = bench_overhead(
        budgets=integers(budgets, "--budgets"),
        batch_sizes=integers(batch_sizes, "--batch-sizes"),
        reducers=list(REDUCERS) if reducers is None else reducers.split(","),
        repeats=repeats,
        backbone=backbone,
        resolution=resolution,
        device=device,
        say=tell,
    )
    show_report(report, as_json)
