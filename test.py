"""Test every checkpoint of a folder on several datasets.

    python test.py --checkpoint_path output --test_data_json sets.json
    python test.py --checkpoint_path weights.pth --model MyModel --if_resizing --image_size 256 --test_data_json CASIA1
    torchrun --standalone --nproc_per_node=4 test.py --checkpoint_path output/checkpoint-7.pth --test_data_json CASIA1

What the command line leaves out (model, its flags, size) is taken from the checkpoint. Writes to --output_dir: per
dataset a folder with log.txt and TensorBoard curves over the checkpoints; results.csv (one row per checkpoint, dataset
and metric); with --save_per_image one CSV per dataset with a row per checkpoint and image. Prints one table at the end.
"""
import signals  # first: the others take seconds

import contextlib
import math

import data
import ddp
import metrics
from checkpoint import checkpoint_epoch, find_checkpoints, load_weights, refuse_different, stored_args
from evaluate import evaluate, evaluation_options
from log import append_file, csv_lines, format_table, json_lines, open_output, say, tensorboard, write_file
from registry import build_model, exit_on_user_error, parse_args, post_function, script_parser


def get_args():
    parser = script_parser(__doc__, output_dir="output_test")
    group = parser.add_argument_group("testing")
    group.add_argument("--test_data_json", "--test_data_path", required=True,
                       help="JSON object {name: path} of test sets, or one test set")
    group.add_argument("--checkpoint_path", required=True,
                       help="folder with checkpoint-<n>.pth files, all of them are tested; or one file")
    group.add_argument("--save_per_image", action="store_true",
                       help="also write every image's metrics and score to a CSV")
    return parse_args(parser, find_stored=stored_args)


def main():
    args, model_args = get_args()
    device = ddp.init(args.device, args.dist_timeout)
    metric_list = [
        # TODO the metrics to compute, the first one decides which checkpoint is best: PixelF1, PixelIOU, PixelAccuracy,
        # PixelAUC (each with mode="origin", "reverse" or "double"), ImageF1, ImageAUC, ImageAccuracy, or a class of
        # your own with their interface
        metrics.PixelF1(threshold=0.5),
        metrics.PixelIOU(threshold=0.5),
    ]
    metric_list = metrics.choose(args.metrics, metric_list, args.if_predict_label, args.threshold)
    dataset_options = data.dataset_options(args, post_function(args.model, model_args), ddp.is_main())
    output_dir, log_dir = open_output(args, model_args)
    ddp.seed_everything(args.seed)

    # Data, checkpoints, model
    with ddp.fail_together():
        paths = find_checkpoints(args.checkpoint_path, "--checkpoint_path")
    refuse_different([path.name for path in paths], f"--checkpoint_path {args.checkpoint_path}")
    with ddp.fail_together(patiently=True):
        model = build_model(args.model, model_args).to(device)
        load_weights(model, paths[0], "--checkpoint_path")  # a wrong one must not cost an earlier run's results
        test_sets = data.open_sets(args.test_data_json, "--test_data_json", **dataset_options)
    for name, test_set in test_sets.items():
        say(f"testing on {name}:", test_set.describe())

    # Every checkpoint on every set; each result is written as soon as it is there
    rows = []  # of results.csv: one per checkpoint, set and metric
    for name in test_sets if ddp.is_main() else ():
        for file in ("log.txt", "per_image.csv"):  # of an earlier run
            (output_dir / name / file).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(tensorboard(log_dir / name, fresh=True)) for name in test_sets}
        for path in paths:
            with ddp.fail_together():
                load_weights(model, path, "--checkpoint_path")
            for name, test_set in test_sets.items():
                result, = evaluate(model, test_set, metric_list, label=f"{path.name}  {name}",
                                   keep_names=args.save_per_image, **evaluation_options(args, device))
                say(f"{path.name}  {name}  {result.describe()}")
                rows += [{"checkpoint": path.name, "set": name, "metric": metric, "value": value,
                          "images": result.counted[metric], "left_out": result.left_out[metric],
                          "fingerprint": test_set.fingerprint} for metric, value in result.values.items()]
                if ddp.is_main():
                    write_result(output_dir / name, path, result, test_set, writers[name], args.save_per_image)
                    write_file(output_dir / "results.csv", csv_lines(rows))

    print_table(rows, [metric.name for metric in metric_list], paths[0].parent)
    say(f"results in {output_dir / 'results.csv'}")
    ddp.cleanup()


def write_result(folder, path, result, test_set, writer, save_per_image):
    """Add one checkpoint's result on one set to the set's log.txt, curves and, if asked for, per_image.csv."""
    epoch = checkpoint_epoch(path)
    folder.mkdir(exist_ok=True)
    append_file(folder / "log.txt", json_lines([{"checkpoint": path.name, "epoch": epoch,
                                                 **{f"test_{name}": value for name, value in result.values.items()},
                                                 "fingerprint": test_set.fingerprint}]))
    for name, value in result.values.items():
        writer.add_scalar(f"test/{name}", value, epoch or 0)
    writer.flush()
    if save_per_image:
        file = folder / "per_image.csv"
        append_file(file, csv_lines([{"checkpoint": path.name, **row} for row in result.rows()],
                                    header=not file.exists()))


def print_table(rows, names, folder):
    """Print sets x metrics for every checkpoint; the best has the highest mean of the first metric over the sets."""
    values = {(row["set"], row["checkpoint"], row["metric"]): row["value"] for row in rows}
    sets, checkpoints = (list(dict.fromkeys(row[key] for row in rows)) for key in ("set", "checkpoint"))
    means = {}
    for checkpoint in checkpoints:
        defined = [values[name, checkpoint, names[0]] for name in sets]
        defined = [value for value in defined if not math.isnan(value)]
        if defined:
            means[checkpoint] = sum(defined) / len(defined)
    best = max(means, key=means.get, default=None) if len(checkpoints) > 1 else None
    table = [[name, checkpoint + " *" * (checkpoint == best), *(values[name, checkpoint, metric] for metric in names)]
             for name in sets for checkpoint in checkpoints]
    say("\n" + format_table(["set", "checkpoint", *names], table))
    if best:
        say(f"* best checkpoint by the mean {names[0]} over the sets: {folder / best} ({means[best]:.4f})")


if __name__ == "__main__":
    exit_on_user_error(main)
