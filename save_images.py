"""Save the masks that one checkpoint predicts, at the images' original size, and the scores.

    python save_images.py --checkpoint_path output --test_data_path CASIA1 --save_overlay
    python save_images.py --checkpoint_path output/checkpoint-7.pth --test_data_path photo.jpg
    python save_images.py --checkpoint_path output --test_data_path photo.jpg --gradcam backbone.stages_3

Takes labelled sets, plain folders of images, and image files. What the command line leaves out (model, its flags, size)
is taken from the checkpoint. Writes to --output_dir: pred/ with 8-bit PNGs (probability x 255), in the sub-folders of
the images; manifest.json, for tools/score.py; scores.csv (name, label, score, PNG); pred_label_rank<r>.json and
pred_label_combined.json (name -> probability) if the model has pred_label; with --save_overlay overlay/ with image,
outlined mask and heat map side by side; with --gradcam gradcam/ with a layer's Grad-CAM over the image as PNG, and by
itself as float32 .npy of the image's size.
"""
import signals  # first: the others take seconds

import argparse
import concurrent.futures
import contextlib
import json
import os

import cv2
import torch

import data
import ddp
from checkpoint import load_chosen, stored_args
from evaluate import check_output, eval_mode, label_scores
from gradcam import GradCam
from log import Progress, csv_lines, open_output, remove_file, say, write_file
from metrics import PixelF1, refuse_bad_values
from panels import heat_over, overlay
from predictions import file_hash, output_names, row_names, to_bytes, write_array, write_manifest, write_png
from registry import (UserError, build_model, counted, exit_on_user_error, is_given, parse_args, post_function,
                      script_parser, visible)


def get_args():
    parser = script_parser(__doc__, evaluates=False, output_dir="output_images")
    group = parser.add_argument_group("saving")
    group.add_argument("--test_data_path", "--test_data_json", required=True, nargs="+",
                       help="test set, plain folder of images, JSON object {name: path} of several, or image files")
    group.add_argument("--checkpoint_path", required=True,
                       help="checkpoint file, or a folder: its best checkpoint, or its newest if it records no best")
    group.add_argument("--save_overlay", action="store_true",
                       help="also write image, outlined mask and heat map side by side, at most 1024 pixels each")
    group.add_argument("--gradcam", default=None, metavar="LAYER",
                       help="also write the Grad-CAM of a layer: a name of model.named_modules(), backbone.layer4 say")
    group.add_argument("--gradcam_target", choices=("mask", "label"), default="mask",
                       help="what Grad-CAM explains: the mask where it is above 0.5, or the image-level score "
                            "(default: %(default)s)")
    for name in ("metrics", "log_dir", "if_predict_label"):  # IMDL-BenCo's launchers pass them
        parser.add_argument(f"--{name}", nargs="*", dest=f"unused_{name}", help=argparse.SUPPRESS)
    return parse_args(parser, find_stored=stored_args)


def open_images(paths, output_dir, **options):
    """Open what --test_data_path gives, one path or several image files; return {name: dataset}.

    A plain folder is taken without what an earlier run wrote to `output_dir`.
    """
    is_set = not os.path.isfile(paths[0]) or paths[0].lower().endswith(".json")
    if len(paths) == 1 and is_set:
        return data.open_sets(paths[0], "--test_data_path", allowed=("ManiDataset", "JsonDataset", "FolderDataset"),
                              leave_out=[output_dir / name for name in ("pred", "overlay", "gradcam")], **options)
    try:
        return {"images": data.FilesDataset(paths, **options)}
    except UserError as error:
        raise UserError(f"--test_data_path {error}") from None


def write_gradcam(file, test_set, index, cam):
    """Write a Grad-CAM (H, W) float32 over its image as a PNG, and by itself as .npy beside it."""
    image = cv2.cvtColor(test_set.read(index)[0], cv2.COLOR_RGB2BGR)
    write_png(file, heat_over(image, to_bytes(cam)))
    write_array(file.with_suffix(".npy"), cam)


def write_overlay(file, test_set, index, pred, row):
    """Write the panel of an image, of which `row` is that of scores.csv."""
    image, mask, _ = test_set.read(index)
    write_png(file, overlay(image, None if row["label"] == "" else mask, pred, row["name"], row["score"]))


def main():
    args, model_args = get_args()
    if args.gradcam is None and is_given("gradcam_target"):
        raise UserError("--gradcam_target says what Grad-CAM explains: give --gradcam LAYER too.")
    device = ddp.init(args.device, args.dist_timeout)
    dataset_options = data.dataset_options(args, post_function(args.model, model_args), ddp.is_main())
    output_dir, _ = open_output(args, model_args)
    unused = [f"--{name.removeprefix('unused_')}" for name, value in vars(args).items()
              if name.startswith("unused_") and value is not None]
    if unused:
        say(f"note: {' '.join(unused)} does nothing here: no metrics are computed, and scores are always saved")
    ddp.seed_everything(args.seed)
    with ddp.fail_together(patiently=True):
        model = build_model(args.model, model_args).to(device)
        cam = GradCam(model, args.gradcam, args.gradcam_target) if args.gradcam is not None else None
    path = load_chosen(model, args.checkpoint_path)
    about = {"checkpoint": path.name, "checkpoint_hash": file_hash(path), "args": {**vars(args), **model_args}}
    with ddp.fail_together(patiently=True):
        test_sets = open_images(args.test_data_path, output_dir, **dataset_options)
    manifests = {name: output_dir / f"manifest{f'_{name}' * (len(test_sets) > 1)}.json" for name in test_sets}
    earlier_files = [*output_dir.glob("pred_label_*.json"), output_dir / "scores.csv", *manifests.values()]
    for earlier in earlier_files if ddp.is_main() else ():
        remove_file(earlier)  # this run may not replace it: fewer processes, or no scores, or it is stopped

    autocast, _ = ddp.mixed_precision(args, device)
    scores, rows, no_scores, clipped = {}, {}, None, False
    for set_name, test_set in test_sets.items():
        say(f"predicting {set_name}:", test_set.describe())
        folder = set_name if len(test_sets) > 1 else ""
        paths = list(map(os.fsdecode, test_set.images))
        files, names = output_names(paths, folder)
        listed, labelled = row_names(test_set, folder), not isinstance(test_set, data.FolderDataset)
        entries = {}  # of the manifest
        loader = data.eval_loader(test_set, args.test_batch_size, args.num_workers, args.pin_mem, ddp.rank(),
                                  ddp.world_size())
        with (ddp.fail_together(), concurrent.futures.ThreadPoolExecutor(4) as pool, torch.no_grad(),
              eval_mode(model, not args.no_model_eval), cam or contextlib.nullcontext(),
              Progress(f"predicting {set_name}", len(test_set), not args.no_progress) as bar):
            jobs = []  # of the batch before, done beside the forward of this one
            for step, loaded in enumerate(loader):
                indices = loaded["index"].tolist()
                batch = data.to_device(loaded, device)
                with autocast():
                    output = cam.run(**batch) if cam else model(**batch)
                if step == 0:
                    check_output(output, batch, (), args.model)
                    if output.get("pred_mask") is None:
                        raise UserError(f"model {args.model}: forward returned no pred_mask, which is what is saved "
                                        "here; test.py --save_per_image writes the scores.")
                pred = output["pred_mask"].detach().float()
                lowest, highest = pred.amin(dim=(1, 2, 3)).tolist(), pred.amax(dim=(1, 2, 3)).tolist()
                refuse_bad_values([PixelF1()], lowest, highest, [False] * len(pred), batch["name"], args.model)
                clipped = clipped or min(lowest) < 0 or max(highest) > 1
                values, reason = scores_of(output, batch["label"])
                no_scores = no_scores or reason
                scores |= {names[i]: value for i, value in zip(indices, values)}
                for i, label, value, (height, width) in zip(indices, loaded["label"].tolist(),
                                                            values or [""] * len(indices),
                                                            loaded["original_shape"].tolist()):
                    png = os.path.join("pred", folder, files[i])
                    rows[png] = {"name": listed[i], "label": label if labelled else "", "score": value, "png": png}
                    entries[i] = {"name": os.fsdecode(test_set.names[i]), "label": label if labelled else None,
                                  "score": None if value == "" else value, "file": png, "height": height,
                                  "width": width}

                # masks, overlays, Grad-CAMs
                for job in jobs:
                    job.result()
                jobs.clear()
                cams = cam.maps(output, batch["shape"]).numpy() if cam else [None] * len(indices)
                for i, one, heat, shape, original in zip(indices, pred[:, 0].cpu().numpy(), cams,
                                                         loaded["shape"].tolist(), loaded["original_shape"].tolist()):
                    mask = to_bytes(data.restore_size(one, shape, original, args.if_padding))
                    jobs.append(pool.submit(write_png, output_dir / "pred" / folder / files[i], mask))
                    if args.save_overlay:
                        row = rows[os.path.join("pred", folder, files[i])]
                        jobs.append(pool.submit(write_overlay, output_dir / "overlay" / folder / files[i], test_set, i,
                                                mask, row))
                    if cam:
                        heat = data.restore_size(heat, shape, original, args.if_padding)
                        gradcam = output_dir / "gradcam" / folder / files[i]
                        jobs.append(pool.submit(write_gradcam, gradcam, test_set, i, heat))
                bar.update(len(indices) * ddp.world_size())
            for job in jobs:
                job.result()
        entries = {i: entry for share in ddp.gather(entries) for i, entry in share.items()}
        if ddp.is_main():
            write_manifest(manifests[set_name], test_set, [entries[i] for i in sorted(entries)], set=set_name,
                           size="original", form="8-bit PNG", **about)

    if any(ddp.gather(clipped)):
        say(f"note: pred_mask of {args.model} leaves 0..1, as logits do: the masks are clipped to it")
    combined = save_scores(scores, no_scores, output_dir)
    rows = {png: row for share in ddp.gather(rows) for png, row in share.items()}
    if ddp.is_main():
        write_file(output_dir / "scores.csv", csv_lines(sorted(rows.values(), key=lambda row: row["name"])))
    if isinstance(test_set, data.FilesDataset):
        for photo, name, file in zip(paths, names, files):
            score = f"score {combined[name]:.4f}" if name in combined else "no score"
            say(visible(f"{photo}: {score}, mask {output_dir / 'pred' / file}"))
    say(f"\npredicted by {args.model}, {path}:\n{counted(len(rows), 'mask')} in {output_dir / 'pred'}")
    if args.save_overlay:
        say(f"{counted(len(rows), 'panel')} in {output_dir / 'overlay'}")
    if cam:
        say(f"Grad-CAM of {args.gradcam} in {output_dir / 'gradcam'}")
    if combined:
        say(f"{counted(len(combined), 'score')} in {output_dir / 'pred_label_combined.json'}")
    say(f"{counted(len(rows), 'row')} in {output_dir / 'scores.csv'}")
    ddp.cleanup()


def scores_of(output, label):
    """Return (one probability per image, None), or ([], reason) where the model gives no such scores."""
    scores = label_scores(output, label)
    if scores is None:
        if output.get("pred_label") is None:
            return [], "the model returns no pred_label"
        return [], (f"pred_label has shape {tuple(torch.as_tensor(output['pred_label']).shape)} for a batch of "
                    f"{counted(len(label), 'image')}: one value per image is wanted")
    scores = scores.tolist()
    wrong = [score for score in scores if not 0 <= score <= 1]
    return ([], f"pred_label holds {wrong[0]:.4g}, which is no probability") if wrong else (scores, None)


def save_scores(scores, no_scores, output_dir):
    """Write this rank's scores and, on rank 0, all of them, and return all; or say why there are none and return {}."""
    shares = ddp.gather((scores, no_scores))
    reason = next((reason for _, reason in shares if reason), None)
    if reason:
        say(f"no scores: {reason}")
        return {}
    combined = {name: score for share, _ in shares for name, score in share.items()}
    write_file(output_dir / f"pred_label_rank{ddp.rank()}.json", json.dumps(scores, indent=1))
    if ddp.is_main():
        write_file(output_dir / "pred_label_combined.json", json.dumps(dict(sorted(combined.items())), indent=1))
    return combined


if __name__ == "__main__":
    exit_on_user_error(main)
