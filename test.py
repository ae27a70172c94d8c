"""Test every checkpoint of a folder on several datasets.

    python test.py --checkpoint_path output --test_data_json sets.json
    python test.py --checkpoint_path weights.pth --model MyModel --if_resizing --image_size 256 --test_data_json CASIA1
    torchrun --standalone --nproc_per_node=4 test.py --checkpoint_path output/checkpoint-7.pth --test_data_json CASIA1

What the command line leaves out (model, its flags, size) is taken from the checkpoint. Writes to --output_dir: per
dataset a folder with log.txt and TensorBoard curves over the checkpoints; results.csv (one row per checkpoint, dataset
and metric, with a 95 % interval over the images), the same as .json, .md and .tex; with --save_per_image one CSV per
dataset with a row per checkpoint and image; with --save_predictions the maps; with --report a page to look at. Prints
one table at the end.
"""
import signals  # first: the others take seconds

import contextlib
import sys

import data
import ddp
import metrics
from checkpoint import checkpoint_epoch, find_checkpoints, load_weights, refuse_different, stored_args
from evaluate import evaluate, evaluation_options
from log import append_file, csv_lines, json_lines, open_output, remove_file, say, say_places, tensorboard, write_file
from predictions import Saver, file_hash, versions
from registry import build_model, counted, exit_on_user_error, parse_args, post_function, script_parser
from results import make_report, print_table, result_rows, write_results


def get_args():
    parser = script_parser(__doc__, output_dir="output_test")
    group = parser.add_argument_group("testing")
    group.add_argument("--test_data_json", "--test_data_path", required=True,
                       help="JSON object {name: path} of test sets, or one test set")
    group.add_argument("--checkpoint_path", required=True,
                       help="folder with checkpoint-<n>.pth files, all of them are tested; or one file")
    group.add_argument("--save_per_image", action="store_true",
                       help="also write every image's metrics and score to a CSV")
    group.add_argument("--save_predictions", nargs="?", choices=["8bit", "float"], const="8bit", default=None,
                       help="also save the predicted masks, for tools/score.py: as 8-bit PNG, or as float32 .npy, "
                            "which scores exactly as this run did (8bit when the flag stands alone)")
    group.add_argument("--report", action="store_true",
                       help="also make a page to look at, report.html: tables, curves, the best and the worst images "
                            "(turns on --save_per_image and --save_predictions; see tools/report.py)")
    return parse_args(parser, find_stored=stored_args)


def main():
    args, model_args = get_args()
    metric_list = [
        # TODO the metrics to compute, the first one decides which checkpoint is best: any of README.md, "Metrics",
        # others by their mode, PixelF1(mode="double"), or a class of your own with their interface
        metrics.PixelF1(threshold=0.5),
        metrics.PixelIOU(threshold=0.5),
    ]
    metric_list = metrics.choose(args.metrics, metric_list, args.if_predict_label, args.threshold, args.score_from)
    device = ddp.init(args.device, args.dist_timeout)
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
    save_per_image = args.save_per_image or args.report
    save_predictions = args.save_predictions or ("8bit" if args.report else None)
    for name in test_sets if ddp.is_main() else ():
        for file in ("log.txt", "per_image.csv"):  # of an earlier run
            remove_file(output_dir / name / file)
    with contextlib.ExitStack() as stack:
        writers = {name: stack.enter_context(tensorboard(log_dir / name, fresh=True)) for name in test_sets}
        for path in paths:
            with ddp.fail_together():
                load_weights(model, path, "--checkpoint_path")
            for name, test_set in test_sets.items():
                saver = save_predictions and Saver(output_dir / name / "predictions" / path.stem, test_set,
                                                   save_predictions)
                result, = evaluate(model, test_set, metric_list, label=f"{path.name}  {name}", on_batch=saver,
                                   keep_names=save_per_image, **evaluation_options(args, device))
                say(f"{path.name}  {name}  {result.describe()}")
                if saver:
                    saver.finish(set=name, checkpoint=path.name, checkpoint_hash=file_hash(path),
                                 args={**vars(args), **model_args})
                    say(f"predictions in {saver.folder}")
                if ddp.is_main():
                    rows += result_rows(result, metric_list, {"checkpoint": path.name, "set": name},
                                        {"fingerprint": test_set.fingerprint, "eval_size": args.eval_size})
                    write_result(output_dir / name, path, result, test_set, writers[name], save_per_image)
                    write_file(output_dir / "results.csv", csv_lines(rows))

    if ddp.is_main():
        write_results(output_dir, rows, {"command": sys.argv, "versions": versions()})
    if args.report:
        make_report(output_dir, args)
    if ddp.is_main():
        print_table(rows, paths[0].parent, output_dir / "results.md")
    say(f"tested {args.model}, {counted(len(paths), 'checkpoint')} on {counted(len(test_sets), 'set')}")
    say_places({output_dir / "results.csv": "all values, with 95 % intervals; also as .json, .md and .tex",
                **({output_dir / "report.html": "a page of tables, curves and images"} if args.report else {}),
                output_dir / name / "per_image.csv": "a row per checkpoint and image, in every set's folder",
                output_dir / name / "predictions": "the maps, in every set's folder, for tools/score.py",
                log_dir: "curves over the checkpoints, for runs/tensorboard.sh"})
    ddp.cleanup()


def write_result(folder, path, result, test_set, writer, save_per_image):
    """Add one checkpoint's result on one set to the set's log.txt, curves and, if asked for, per_image.csv."""
    epoch = checkpoint_epoch(path)
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


if __name__ == "__main__":
    exit_on_user_error(main)
