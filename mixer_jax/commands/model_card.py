"""The model card of a published folder: README.md with the hub's front matter, from facts alone."""

__all__ = ["CardFacts", "evaluation_lines", "model_card", "run_lines"]

import json
import os
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from convert import Checkpoint, CheckpointError, MixerConfig
from convert.hub_folder import NEAREST

from ..evaluation import Accuracy

PAPER = "https://arxiv.org/abs/2105.01601"
LARGEST = 64 << 20  # bytes of a file of evaluation
WEIGHTS_OF_RUN = ("best", "last")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says. `tree` is the content of config.json, `name` that of the repository if `pushed`, else of the folder.

    `gap` has the largest difference that the exact GELU makes, and the standard deviation of the outputs.
    `replaced_preprocessing` is the file's own, where another was chosen.
    """

    name: str
    pushed: bool
    config: MixerConfig
    tree: Mapping[str, Any]
    licence: str | None
    parameters: int
    dtype: str
    fingerprint: str
    gap: tuple[float, float] | None
    preprocessing: str
    replaced_preprocessing: str | None
    training: list[str]
    evaluation: list[str]


def model_card(facts: CardFacts) -> str:
    config = facts.config
    task = "image-classification" if config.num_classes else "image-feature-extraction"
    front = ["library_name: timm", f"pipeline_tag: {task}", "tags:", *(f"- {t}" for t in (task, "timm", "transformers"))]
    front += ["- mlp-mixer", *([f"license: {facts.licence}"] if facts.licence else [])]
    size, patch = ("x".join(map(str, pair)) for pair in (config.image_size, config.patch_size))
    named = " with names (`label_names` in config.json)" if "label_names" in facts.tree else ""
    rows = {
        "architecture": f"`{facts.tree['architecture']}` of timm",
        "parameters": f"{facts.parameters:,}, {facts.dtype}",
        "input": f"{config.in_channels} channels, {size} pixels, patches of {patch}",
        "output": f"{config.num_classes} classes{named}" if config.num_classes else f"{config.hidden_dim} features: no head",
        "licence": facts.licence or "not stated",
        "fingerprint": f"`{facts.fingerprint}`, the same in every layout and format of these weights",
    }
    measured = {"Training": facts.training, "Evaluation": facts.evaluation}
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {_plain(facts.name)}",
        f"An MLP-Mixer ([Tolstikhin et al. 2021]({PAPER})).",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]),
        "## Use\n\n" + _usage(facts),
        "## Numerics\n\n" + _numerics(facts),
        "## Preprocessing\n\n" + _preprocessing(facts),
        *(f"## {title}\n\n" + "\n".join(lines) for title, lines in measured.items() if lines),
    ]
    return "\n\n".join(parts) + "\n"


def _usage(facts: CardFacts) -> str:
    """A block of Python for each of timm, transformers and mixer_jax."""
    name, auto = json.dumps(facts.name), "AutoModelForImageClassification" if facts.config.num_classes else "AutoModel"
    for_timm, ours = (json.dumps(f"{p}{facts.name}" if facts.pushed else facts.name) for p in ("hf-hub:", "hf:"))
    for_timm = for_timm if facts.pushed else json.dumps(f"local-dir:{facts.name}")
    partial, nn = (["from functools import partial", ""], ["from torch import nn"]) if facts.gap else ([], [])
    tanh = 'partial(nn.GELU, approximate="tanh")'
    blocks = [
        [*partial, "import timm", *nn, ""],
        [*partial, *nn, f"from transformers import {'AutoConfig, ' if facts.gap else ''}AutoImageProcessor, {auto}", ""],
        ["import mixer_jax", "", f"model = mixer_jax.load({ours})  # finds numerics and preprocessing in the folder"],
    ]
    told = [f"tanh = {tanh}  # as these weights were trained"] if facts.gap else []
    blocks[0] += [*told, f"model = timm.create_model({for_timm}, pretrained=True{', act_layer=tanh' if told else ''}).eval()"]
    blocks[0] += ["transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))"]
    told = [f"config = AutoConfig.from_pretrained({name})"] if facts.gap else []
    told += [f'config.model_args = {{**(config.model_args or {{}}), "act_layer": {tanh}}}'] if facts.gap else []
    blocks[1] += [*told, f"model = {auto}.from_pretrained({name}{', config=config' if told else ''})"]
    blocks[1] += [f"processor = AutoImageProcessor.from_pretrained({name})"]
    return "\n\n".join("\n".join(["```python", *block, "```"]) for block in blocks)


def _numerics(facts: CardFacts) -> str:
    config = facts.config
    text = f"{config.gelu} GELU, LayerNorm epsilon {config.layer_norm_epsilon:g}."
    if facts.gap is None:
        return f"{text} timm's own code computes the same."
    max_abs, std = facts.gap
    what = "logits" if config.num_classes else "features"
    return (
        f"{text} timm's own code computes the exact GELU unless it is given `act_layer`, as above, which config.json cannot "
        f"say: {what} are then off by up to {max_abs:.1e}, where their standard deviation is {std:.2g}: measured on these "
        "weights, in float64, with one image of uniform noise."
    )


def _preprocessing(facts: CardFacts) -> str:
    cfg = facts.tree["pretrained_cfg"]
    mean, std = (", ".join(f"{value:g}" for value in cfg[name]) for name in ("mean", "std"))
    text = (
        f"`{facts.preprocessing}`: {cfg['interpolation']} interpolation, crop mode {cfg['crop_mode']} with a crop of "
        f"{cfg['crop_pct']:g} of the resized image, mean {mean}, standard deviation {std} of values from 0 to 1."
    )
    if (before := facts.replaced_preprocessing) is None:
        return text
    why = "which timm's transforms cannot compute" if before in NEAREST else "in place of which this one was chosen"
    return f"{text} The weights were made for `{before}`, {why}: results that were measured with it may differ."


def run_lines(weights: Path) -> list[str]:
    """What the run of `finetune` says whose `best` or `last` these weights are; nothing for others."""
    if weights.name not in WEIGHTS_OF_RUN:
        return []
    from ..training.run_folder import CONFIG, KIND, METRICS

    run = weights.parent
    if not (run / CONFIG).is_file() or not (run / METRICS).is_file():
        return []
    settings = _parsed(run / CONFIG)
    if not isinstance(settings, dict) or settings.get("kind") != KIND:
        return []
    try:
        rows = [json.loads(line) for line in (run / METRICS).read_text("utf-8").splitlines() if line.endswith("}")]
        return _lines_of_run(weights.name, settings, rows)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{run}: its {CONFIG} or {METRICS} is damaged ({type(error).__name__}: {error})") from None


def _lines_of_run(name: str, settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    scored = [row for row in rows if "validation_images" in row]
    end: dict[str, Any] = next((row for row in rows if "best_step" in row), {})
    lines = ["Fine-tuned by `python -m mixer_jax finetune`:", ""]

    def add(what: str, part: str, row: Mapping[str, Any]) -> None:
        correct, images = row[f"{part}_correct"], row[f"{part}_images"]
        lines.append(f"- {what}: {100 * correct / images:.2f} % of {images:,} {part} images right ({correct:,})")

    if scored:
        signs = {"validation_correct": 1, "validation_loss": -1, "step": -1}  # as the run chose its best
        best = max(scored, key=lambda row: [sign * row[key] for key, sign in signs.items()])
        row = best if name == "best" else scored[-1]
        add(f"step {row['step']}", "validation", row)
    if "test_images" in end and name == "best":
        add("once, at the end", "test", end)
    data = {part: about["images"] for part, about in settings["data"].items()}
    lines.append("- images: " + ", ".join(f"{count:,} for {part}" for part, count in data.items()))
    began = _plain(settings["model"]["weights"])  # "random, S/32", or a fingerprint
    scratch = began.startswith("random, ")
    lines.append(f"- began from {began.replace(',', ' weights of', 1) if scratch else f'weights of fingerprint `{began}`'}")
    lines += ["- settings:", "", "```json", json.dumps(settings["config"], indent=2), "```"]
    return lines


def evaluation_lines(path: str | os.PathLike[str], checkpoint: Checkpoint, fingerprint: str) -> list[str]:
    """What `evaluate --json` printed into a file. Raises CheckpointError for another file and for that of other weights."""
    file = Path(path)
    if file.is_file() and file.stat().st_size > LARGEST:
        raise CheckpointError(f"{path}: larger than {LARGEST >> 20} MiB, so not what `evaluate --json` printed")
    tree = _parsed(file)
    try:
        identity = tree["fingerprint"]
        keys = {"top-1": "top1", "top-5": "top5", "ReaL": "real"}
        figures = {name: astuple(Accuracy(**tree[key])) for name, key in keys.items() if tree[key]}
        rows = [
            f"| {name} | {100 * accuracy:.2f} % | {100 * low:.2f} to {100 * high:.2f} % | {correct:,} of {images:,} |"
            for name, (correct, images, accuracy, low, high) in figures.items()
        ]
        used, matched = _plain(tree["preprocessing"]), _plain(tree["matched_by"])
        unreadable = int(tree["unreadable"])
        where = f"`{_plain(Path(tree['file']).name)}` on `{_plain(Path(tree['folder']).name)}`"
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not what `evaluate --json` printed ({type(error).__name__}: {error}): python -m mixer_jax evaluate FILE "
            f"FOLDER --json > {file.name}"
        ) from None
    if identity != fingerprint:
        raise CheckpointError(f"{path}: of weights with the fingerprint {_plain(identity)}, and these have {fingerprint}")
    lines = [f"Of {where}, folders matched to classes by {matched}, preprocessing `{used}`:", ""]
    lines += ["| | accuracy | 95 % interval | images |", "| --- | --- | --- | --- |", *rows]
    if used != checkpoint.metadata.preprocessing:
        lines += [
            "",
            f"This folder has the preprocessing `{checkpoint.metadata.preprocessing}`, with which the figures may differ.",
        ]
    if unreadable:
        lines += ["", f"{unreadable} image{'s' * (unreadable != 1)} could not be read and count neither way."]
    return lines


def _parsed(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not JSON ({error})") from None


def _plain(text: Any) -> str:
    """On one line and without Markdown's marks for code."""
    return re.sub(r"[`\0-\x1f\x7f-\x9f|]", " ", str(text))
