"""Charts of several runs as a picture, by matplotlib (the extra `plot`)."""

import io
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.runs.comparison import Run
from lit_gpt.runs.curves import Curve, read_curves

MAX_CURVES = 20  # of different colors
# Fonts for names in Chinese, Japanese and Korean, as far as they are installed.
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei")


def draw_runs(runs: list[Run], labels: list[str]) -> bytes:
    """Return a PNG: the validation loss over tokens, dotted the training loss; and the best loss over parameters.

    The second chart is drawn only if the runs have models of different sizes.

    Args:
        runs: The runs; the first `MAX_CURVES` of them have curves.
        labels: What the legend says about each.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib import font_manager
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib, which is not installed: pip install -e '.[plot]'") from None
    known = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in CJK_FONTS if name in known)]
    has_sizes = len({run.summary.parameters for run in runs}) > 1
    with mpl.rc_context({"font.family": fonts, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11 if has_sizes else 7.5, 4.6), layout="constrained")
        axes = figure.subplots(1, 2 if has_sizes else 1, squeeze=False)[0]
        _draw_curves(axes[0], runs[:MAX_CURVES], labels)
        if has_sizes:
            _draw_sizes(axes[1], runs)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
    return picture.getvalue()


def _draw_curves(axis: Any, runs: list[Run], labels: list[str]) -> None:
    from matplotlib import colormaps

    colors = colormaps["tab10" if len(runs) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    for run, label, color in zip(runs, labels, colors):
        curves = read_curves(run.folder)
        scale = run.summary.tokens / run.summary.step if run.summary.step else 1.0  # tokens of a step
        dotted = {"linestyle": ":", "linewidth": 1}
        for tag, style in (("loss/val", {"label": label}), ("loss/train_eval", dotted)):
            curve: Curve = curves.get(tag, [])
            style = {**style, "color": color, "marker": "o" if len(curve) == 1 else None}
            axis.plot([step * scale for step, _ in curve], [loss for _, loss in curve], **style)
    axis.set(xlabel="training tokens", ylabel="loss/val, dotted loss/train_eval (nats per token)")
    axis.legend(fontsize=8, frameon=False)
    for text in axis.get_legend().get_texts():
        text.set_parse_math(False)  # a $ in a setting is no formula


def _draw_sizes(axis: Any, runs: list[Run]) -> None:
    points = [(run.summary.parameters, run.summary.best_loss) for run in runs if run.summary.best_loss is not None]
    axis.scatter([parameters for parameters, _ in points], [loss for _, loss in points], s=22)
    axis.set(xscale="log", xlabel="parameters", ylabel="best loss/val (nats per token)")
