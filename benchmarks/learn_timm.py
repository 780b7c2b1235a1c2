"""timm's MlpMixer trained from scratch by PyTorch, beside ours: a process of learn.py in the environment that has timm.

`python learn_timm.py JOB.json IMAGES.npz` prints accuracy and time as JSON. The job has the settings of our run by the names of
`FinetuneConfig` and the sizes of the model by those of `MixerConfig`; the images are `train`, `validation` and `test`, uint8
(n, h, w, c), beside `train_labels` and so on. Model, optimizer, variation of images and loader are timm's and PyTorch's own.
"""

import copy
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.mlp_mixer import MlpMixer
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchvision.transforms import v2
from worker import versions

Part = tuple[torch.Tensor, torch.Tensor]  # uint8 images (n, c, h, w) and labels
RATIOS = 0.75, 1.33  # of random crops, as ours


def part(arrays: Any, name: str) -> Part:
    images = np.ascontiguousarray(arrays[name].transpose(0, 3, 1, 2))
    return torch.from_numpy(images), torch.from_numpy(arrays[f"{name}_labels"].astype(np.int64))


def mixer(sizes: dict[str, Any]) -> MlpMixer:
    ratios = (sizes["tokens_mlp_dim"] / sizes["hidden_dim"], sizes["channels_mlp_dim"] / sizes["hidden_dim"])
    return MlpMixer(
        num_classes=sizes["num_classes"],
        img_size=sizes["image_size"],
        in_chans=sizes["in_channels"],
        patch_size=sizes["patch_size"],
        num_blocks=sizes["num_blocks"],
        embed_dim=sizes["hidden_dim"],
        mlp_ratio=ratios,
    )


def scaled(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


class Varied(TensorDataset):
    """Images with a random crop and flip each time that one is drawn."""

    def __init__(self, images: Part, settings: dict[str, Any]):
        super().__init__(*images)
        size, least = images[0].shape[2:], settings["min_area"]
        crop = [] if least is None else [v2.RandomResizedCrop(size, scale=(least, 1), ratio=RATIOS, antialias=True)]
        self.vary = v2.Compose(crop + [v2.RandomHorizontalFlip(0.5 if settings["flip"] else 0.0)])

    def __getitem__(self, index: int) -> Part:
        image, label = super().__getitem__(index)
        return scaled(self.vary(image)), label


def scores(model: MlpMixer, images: Part, batch_size: int) -> tuple[int, float]:
    """How many images are right, and the mean loss."""
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(scaled(batch)) for batch in images[0].split(batch_size)])
    model.train()
    return int((logits.argmax(1) == images[1]).sum()), float(torch.nn.functional.cross_entropy(logits, images[1]))


def mixed(images: torch.Tensor, labels: torch.Tensor, alpha: float, classes: int) -> Part:
    """Images and labels, as probabilities, each mixed with those of the reversed batch in one proportion."""
    share = float(np.random.beta(alpha, alpha))
    labels = torch.nn.functional.one_hot(labels, classes).float()
    return share * images + (1 - share) * images.flip(0), share * labels + (1 - share) * labels.flip(0)


def rate(step: int, settings: dict[str, Any]) -> float:
    """Relative to the base rate: a linear warm-up, then half a cosine, as in our recipe."""
    warmup, total = settings["warmup_steps"], settings["total_steps"]
    progress = max(step - warmup, 0) / (total - warmup)
    return min(step / warmup, 1) * (1 + math.cos(math.pi * progress)) / 2


def trained(settings: dict[str, Any], sizes: dict[str, Any], parts: dict[str, Part]) -> dict[str, Any]:
    """Test scores of the weights that are best on the validation images: most right, then the lowest loss."""
    torch.manual_seed(settings["seed"])
    np.random.seed(settings["seed"])
    model, batch_size = mixer(sizes), settings["batch_size"]
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=settings["base_rate"],
        betas=(settings["momentum"], settings["b2"]),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings))
    varied = Varied(parts["train"], settings)
    drawn = RandomSampler(varied, num_samples=settings["total_steps"] * batch_size)  # epoch after epoch, without replacement
    best: tuple[tuple[int, float], int, Any] = (-1, 0.0), 0, None
    for step, (images, labels) in enumerate(DataLoader(varied, batch_size, sampler=drawn, num_workers=settings["threads"]), 1):
        if settings["mixup"]:
            images, labels = mixed(images, labels, settings["mixup"], sizes["num_classes"])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
        optimizer.step()
        schedule.step()
        if step % settings["evaluate_every"] == 0 or step == settings["total_steps"]:
            correct, loss = scores(model, parts["validation"], batch_size)
            print(f"step {step}: {correct} of {len(parts['validation'][1])} validation images", file=sys.stderr, flush=True)
            best = max(best, ((correct, -loss), step, None), key=lambda each: each[0])
            if best[1] == step:
                best = *best[:2], copy.deepcopy(model.state_dict())
    model.load_state_dict(best[2])
    correct, loss = scores(model, parts["test"], batch_size)
    figures = {"best_step": best[1], "validation_correct": best[0][0], "validation_images": len(parts["validation"][1])}
    parameters = sum(weight.numel() for weight in model.parameters())
    return figures | {"correct": correct, "images": len(parts["test"][1]), "loss": loss, "parameters": parameters}


def main(job_file: str, images_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["settings"]["threads"])
    with np.load(images_file) as arrays:
        parts = {name: part(arrays, name) for name in ("train", "validation", "test")}
    started = time.perf_counter()
    figures = trained(job["settings"], job["sizes"], parts)
    figures["seconds"] = time.perf_counter() - started
    used = os.times()  # of this process and of the loader's, which have ended
    figures["cpu_s"] = used.user + used.system + used.children_user + used.children_system
    print(json.dumps(figures | {"versions": versions()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
