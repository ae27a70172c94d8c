"""List the models: file, parameters, and floating-point operations (FLOPs) for one image.

    python tools/list_models.py                                          # all, at 512 pixels
    python tools/list_models.py --model MyConvNeXt --image_size 256      # one of them, at another size
    python tools/list_models.py --model MyModel --kernel_size 5          # a single one also takes its own flags

A multiply-add counts as two operations; element-wise operations are not counted. The losses are part of `forward`, and
so of the count, which they hardly change. Each model runs once on the CPU, which takes a large one up to a minute.
Pretrained weights are not downloaded.
"""
import json
import re
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules of the repository

import data
from registry import (MODELS, Parser, UserError, build_model, exit_on_user_error, find_model, import_failure,
                      import_files, is_pretrained_flag, model_files, parameters, parse_args, positive, post_function)


def example_samples(image_size, post_func, count=1, padding=True):
    """Return the first `count` of five samples of a dataset with edge masks, as `data.collate` takes them.

    They are JPEGs of smooth noise, two of them tampered and two authentic, and a black one with a mask. The second and
    the fourth are less high than wide.
    """
    rng, pairs = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            shape = image_size * (4 - i % 2) // 4, image_size
            image = cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), shape[::-1], interpolation=cv2.INTER_CUBIC)
            image = cv2.add(image, rng.integers(0, 16, image.shape, np.uint8)) * (i < 4)
            cv2.imwrite(f"{folder}/{i}.jpg", image)
            cv2.imwrite(f"{folder}/{i}.png", 255 * np.tri(*shape, -(i % 4) * shape[1] // 4, dtype=np.uint8))
            pairs.append([f"{i}.jpg", "Negative" if i in (2, 3) else f"{i}.png"])
        Path(folder, "set.json").write_text(json.dumps(pairs))
        dataset = data.JsonDataset(f"{folder}/set.json", image_size, padding=padding, edge_mask_width=7,
                                   post_func=post_func, fingerprint=False)
        return [dataset[i] for i in range(count)]


def example_batch(image_size, post_func):
    """Return a batch of one tampered image as `forward` receives it, with every optional key."""
    return data.to_device(data.collate(example_samples(image_size, post_func), post_func), torch.device("cpu"))


def build_untrained(name, model_args):
    """Build a model without downloading weights; UserError if `model_args` lacks a parameter that it needs."""
    constructor = parameters(MODELS.get(name)).values()
    missing = [f"--{p.name}" for p in constructor if p.default is p.empty and p.name not in model_args]
    if missing:
        raise UserError(f"needs {' '.join(missing)}: list it alone, with `--model {name}` and these flags.")
    return build_model(name, {**model_args, **{p.name: False for p in constructor if is_pretrained_flag(p)}})


def count_flops(model, batch):
    """Return the number of floating-point operations of one forward."""
    model.eval().requires_grad_(False)  # the counter would put hooks on what needs gradients
    # Attention as plain products, since not all of its fused kernels are counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops()


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", metavar="NAME",
                        help="models to list (default: all); a single one also takes its own flags")
    parser.add_argument("--image_size", type=positive, default=512,
                        help="side of the image in pixels (default: %(default)s)")
    asked = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")])[0].model or []
    args, model_args = parse_args(parser) if len(asked) == 1 else (parser.parse_args(), {})
    for name in asked:
        find_model(name)
    broken = {} if asked else import_files(model_files())
    names = asked or sorted(MODELS.entries)

    row = f"{{:{max(map(len, names), default=0)}}}  {{:{max(map(len, map(MODELS.file, names)), default=0)}}}  "
    print(f"GFLOPs: 1e9 floating-point operations, a multiply-add being 2, for one {args.image_size}x{args.image_size} "
          f"image forward, losses included\n\n{row.format('model', 'file')}   parameters     trainable    GFLOPs")
    listed = 0
    for name in names:
        print(row.format(name, MODELS.file(name)), end="", flush=True)
        try:
            given = {key: value for key, value in vars(args).items() if key in parameters(MODELS.get(name))}
            model = build_untrained(name, {**given, **model_args})
            sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
            flops = count_flops(model, example_batch(args.image_size, post_function(name, model_args)))
            print(f"{sum(n for n, _ in sizes):13,} {sum(n for n, trainable in sizes if trainable):13,} "
                  f"{flops / 1e9:9.2f}", flush=True)
            listed += 1
        except UserError as error:
            print(re.split(r"(?<=[.!?])\s", str(error))[0], flush=True)  # the first sentence
        except Exception as error:  # whatever a user's model raises
            print(f"{type(error).__name__}: {error}".split("\n")[0], flush=True)
    for file, error in broken.items():
        print(import_failure(file, error))
    if not listed:
        raise UserError("no model could be measured, the lines above say why." if names else "models/ holds no model.")


if __name__ == "__main__":
    exit_on_user_error(main)
