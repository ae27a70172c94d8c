"""Save the masks that one checkpoint predicts, at the pictures' original size, and the scores.

    python save_images.py --model MyModel --test_data_path CASIA1 --checkpoint_path output --if_resizing --save_overlay
    python save_images.py --model MyModel --test_data_path photos --checkpoint_path output/checkpoint-7.pth --if_padding

Takes labelled sets and plain folders of pictures. Writes to --output_dir: pred/ with 8-bit PNGs (probability x 255), in
the sub-folders of the pictures; pred_label_rank<r>.json and pred_label_combined.json (name -> probability) if the model
has pred_label; with --save_overlay overlay/ with picture, mask and heat map side by side.
"""
from registry import build_model, parse_args, post_function, run, script_parser, UserError


def get_args():
    parser = script_parser(__doc__, evaluates=False, output_dir="output_images")
    group = parser.add_argument_group("saving")
    group.add_argument("--test_data_path", "--test_data_json", required=True,
                       help="test set, plain folder of pictures, or a JSON object {name: path} of several")
    group.add_argument("--checkpoint_path", required=True,
                       help="checkpoint file, or a folder: the newest checkpoint-<n>.pth in it")
    group.add_argument("--save_overlay", action="store_true", help="also write picture, mask and heat map side by side")
    return parse_args(parser)


if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes answer at once
    args, model_args = run(get_args)

import collections
import concurrent.futures
import json
import os

import cv2
import numpy as np
import torch

import data
import ddp
import metrics
from ddp import is_main, say


def output_names(paths, folder=""):
    """Return (files, names): each picture's PNG below pred/<folder>, and its key among the scores.

    A PNG lies where its picture lies below the pictures' common folder, so nothing leaves the output folder whatever
    the paths are; pictures that differ in nothing but the extension keep it (`a.jpg.png`). The key is the file's name,
    or its relative path where names collide.
    """
    paths = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    below = [os.path.relpath(path, root) for path in paths]
    stems = [os.path.splitext(path)[0] for path in below]
    once = set(below)  # a picture listed twice gives one PNG
    same_stem = collections.Counter(os.path.splitext(path)[0].lower() for path in once)
    same_name = collections.Counter(os.path.basename(path) for path in once)
    taken = {path.lower() for path in below}  # beside a.jpg, the picture a.jpg.png keeps its extension too
    files = [(stem if same_stem[stem.lower()] == 1 and stem.lower() not in taken else path) + ".png"
             for stem, path in zip(stems, below)]
    names = [os.path.basename(path) if same_name[os.path.basename(path)] == 1 and not folder
             else os.path.join(folder, path) for path in below]
    return files, names


def restore_size(pred, shape, original, padding):
    """Bring a prediction (S, S) float back to the picture's original (H, W) as uint8.

    Padding is cut off, and what padding mode had cropped away is 0; otherwise it is resized bilinearly.
    """
    height, width = original
    if padding:
        full = np.zeros((height, width), np.float32)
        full[:shape[0], :shape[1]] = pred[:shape[0], :shape[1]]
    else:
        full = cv2.resize(pred, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.rint(full.clip(0, 1) * 255).astype(np.uint8)


def write_overlay(file, test_set, index, pred):
    """Write picture, mask (where there are labels) and heat map of the prediction side by side."""
    mask_path = test_set.masks[index] or None
    image, mask, _ = data.read_pair(test_set.images[index], mask_path)
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    heat = cv2.addWeighted(image, 0.5, cv2.applyColorMap(pred, cv2.COLORMAP_JET), 0.5, 0)
    labelled = not isinstance(test_set, data.FolderDataset)
    truth = [cv2.cvtColor(mask * 255, cv2.COLOR_GRAY2BGR)] if labelled else []
    write_png(file, np.concatenate([image, *truth, heat], axis=1))


def write_png(file, pixels):
    """Write a PNG, making its folder; UserError where that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imencode(".png", pixels)[1].tofile(file)  # imwrite garbles names that are not ASCII on Windows
    except OSError as error:
        raise UserError(f"{file} can't be written ({error.strerror}): free some space or give another --output_dir."
                        ) from None


def scores_of(output, count):
    """Return (list of one probability per picture, None), or (None, reason) where the model gives no such scores."""
    label = output.get("pred_label")
    if label is None:
        return None, "the model returns no pred_label"
    label = torch.as_tensor(label).detach().float().cpu()
    if label.shape not in ((count,), (count, 1)) and not (label.dim() == 0 and count == 1):
        return None, (f"pred_label has shape {tuple(label.shape)} for a batch of {count} pictures: "
                      "one value per picture is wanted")
    values = label.reshape(count).tolist()
    if not all(0 <= value <= 1 for value in values):
        return None, f"pred_label holds {next(v for v in values if not 0 <= v <= 1):.4g}, which is no probability"
    return values, None


def main(args, model_args):
    device = ddp.init(args)
    output_dir = ddp.start_testing(args, model_args)
    options = data.dataset_options(args, post_function(args.model, model_args), is_main())
    with ddp.together():
        model = build_model(args.model, model_args).to(device)
        ddp.newest_for_testing(model, args, model_args)
        test_sets = data.open_sets(args.test_data_path, "--test_data_path",
                                   allowed=("ManiDataset", "JsonDataset", "FolderDataset"), **options)
    for earlier in output_dir.glob("pred_label_*.json") if is_main() else ():
        earlier.unlink(missing_ok=True)  # this run may not replace it: fewer processes, or no scores
    if not args.no_model_eval:
        model.eval()

    scores, no_scores, clipped = {}, None, False
    for set_name, test_set in test_sets.items():
        say(f"predicting {set_name}:", test_set.describe())
        folder = set_name if len(test_sets) > 1 else ""
        files, names = output_names([test_set.images[i] for i in range(len(test_set))], folder)
        loader = data.eval_loader(test_set, args.test_batch_size, args.num_workers, args.pin_mem, ddp.rank(),
                                  ddp.world_size())
        with concurrent.futures.ThreadPoolExecutor(4) as pool, torch.no_grad():
            for batch in loader:
                indices = batch.pop("index").tolist()
                batch = data.to_device(batch, device, args.if_padding)
                with torch.autocast(device.type, enabled=device.type == "cuda" and not args.if_not_amp):
                    output = metrics.run_model(model, batch, args.model)
                if output.get("pred_mask") is None:
                    raise UserError(f"model {args.model}: forward returned no pred_mask, so there is no mask to save.")
                pred = output["pred_mask"].float()
                if pred.isnan().any():
                    raise UserError(f"model {args.model}: pred_mask holds NaN for {batch['name'][0]} or a picture of "
                                    "its batch; the training has probably diverged: take an earlier checkpoint.")
                clipped = clipped or bool(pred.min() < 0 or pred.max() > 1)
                values, reason = scores_of(output, len(indices))
                no_scores = no_scores or reason
                for i, value in zip(indices, values or ()):
                    scores[names[i]] = value

                # masks and overlays
                jobs = []
                for i, one, shape, original in zip(indices, pred[:, 0].cpu().numpy(), batch["shape"].tolist(),
                                                   batch["original_shape"].tolist()):
                    mask = restore_size(one, shape, original, args.if_padding)
                    jobs.append(pool.submit(write_png, output_dir / "pred" / folder / files[i], mask))
                    if args.save_overlay:
                        overlay = output_dir / "overlay" / folder / files[i]
                        jobs.append(pool.submit(write_overlay, overlay, test_set, i, mask))
                for job in jobs:
                    job.result()
        say(f"{len(test_set)} masks in {output_dir / 'pred' / folder}")

    if any(ddp.gather(clipped)):
        say(f"note: pred_mask of {args.model} leaves 0..1, as logits do: the masks are clipped to it")
    save_scores(scores, no_scores, output_dir)
    ddp.cleanup()


def save_scores(scores, no_scores, output_dir):
    """Write this rank's scores and, on rank 0, all of them; or say why there are none."""
    shares = ddp.gather((scores, no_scores))
    reason = next((reason for _, reason in shares if reason), None)
    if reason:
        say(f"no scores: {reason}")
        return
    text = json.dumps(scores, indent=1)
    ddp.write_atomically(output_dir / f"pred_label_rank{ddp.rank()}.json", lambda temporary: temporary.write_text(text))
    if is_main():
        combined = {name: value for share, _ in shares for name, value in share.items()}
        text_of_all = json.dumps(dict(sorted(combined.items())), indent=1)
        ddp.write_atomically(output_dir / "pred_label_combined.json",
                             lambda temporary: temporary.write_text(text_of_all))
        say(f"{len(combined)} scores in {output_dir / 'pred_label_combined.json'}")


if __name__ == "__main__":
    run(lambda: main(args, model_args))
