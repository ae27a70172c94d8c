"""Test every checkpoint of a folder on several datasets.

    python test.py --model MyModel --test_data_json sets.json --checkpoint_path output --if_resizing --image_size 256
    torchrun --standalone --nproc_per_node=4 test.py --model MyModel --checkpoint_path output/checkpoint-7.pth ...

Writes to --output_dir: per dataset a folder with log.txt and TensorBoard curves over the checkpoints; results.csv (one
row per checkpoint, dataset and metric); with --save_per_image one CSV per dataset with a row per checkpoint and
picture. Prints one table at the end.
"""
from registry import build_model, parse_args, post_function, run, script_parser


def get_args():
    parser = script_parser(__doc__, output_dir="output_test")
    group = parser.add_argument_group("testing")
    group.add_argument("--test_data_json", "--test_data_path", required=True,
                       help="JSON object {name: path} of test sets, or one test set")
    group.add_argument("--checkpoint_path", required=True,
                       help="folder with checkpoint-<n>.pth files, all of them are tested; or one file")
    group.add_argument("--save_per_image", action="store_true",
                       help="also write every picture's metrics and score to a CSV")
    return parse_args(parser)


if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes answer at once
    args, model_args = run(get_args)

import functools
import math

import data
import ddp
import metrics
from ddp import is_main, say


def main(args, model_args):
    device = ddp.init(args)
    metric_list = [
        # TODO the metrics to compute, the first one decides which checkpoint is best: PixelF1, PixelIOU, PixelAccuracy,
        # PixelAUC (each with mode="origin", "reverse" or "double"), ImageF1, ImageAUC, ImageAccuracy, or a class of
        # your own with their interface
        metrics.PixelF1(threshold=0.5),
        metrics.PixelIOU(threshold=0.5),
    ]
    metric_list = metrics.choose(args.metrics, metric_list, args.if_predict_label)
    output_dir, log_dir = ddp.start_testing(args, model_args)

    # Data, checkpoints, model
    options = data.dataset_options(args, post_function(args.model, model_args), is_main())
    with ddp.together():
        test_sets = data.open_sets(args.test_data_json, "--test_data_json", **options)
    for name, test_set in test_sets.items():
        say(f"testing on {name}:", test_set.describe())
    paths = ddp.find_checkpoints(args.checkpoint_path, "--checkpoint_path")
    model = build_model(args.model, model_args).to(device)
    move = functools.partial(data.to_device, device=device, padding=args.if_padding)

    # Every checkpoint on every set
    results = []  # (checkpoint number or None, path, set name, Result)
    for path in paths:
        epoch = ddp.checkpoint_epoch(path)
        ddp.load_weights(model, ddp.load_checkpoint(path, "--checkpoint_path"), path, "--checkpoint_path")
        for name, test_set in test_sets.items():
            loader = data.eval_loader(test_set, args.test_batch_size, args.num_workers, args.pin_mem, ddp.rank(),
                                      ddp.world_size())
            result, = metrics.evaluate(model, loader, metric_list, move, amp=not args.if_not_amp,
                                       model_eval=not args.no_model_eval, expected=len(test_set), model_name=args.model,
                                       keep_names=args.save_per_image)
            say(f"{path.name}  {name}  {result.describe()}")
            results.append((epoch, path, name, result))

    if is_main():
        write_results(results, test_sets, metric_list, output_dir, log_dir, args)
    ddp.cleanup()


def write_results(results, test_sets, metric_list, output_dir, log_dir, args):
    """Write logs, curves and CSVs, and print the table; the best checkpoint has the highest mean of the first metric
    over the sets."""
    first = metric_list[0].name
    scores = {}
    for _, path, _, result in results:
        scores.setdefault(path, []).extend([] if math.isnan(result.values[first]) else [result.values[first]])
    means = {path: sum(values) / len(values) for path, values in scores.items() if values}
    best = max(means, key=means.get, default=None)

    for name, test_set in test_sets.items():
        folder = ddp.make_output_dir(output_dir / name)
        rows = [{"checkpoint": path.name, "epoch": epoch, **{f"test_{k}": v for k, v in result.values.items()},
                 "fingerprint": test_set.fingerprint}
                for epoch, path, owner, result in results if owner == name]
        ddp.write_lines(folder / "log.txt", rows)
        with ddp.tensorboard(log_dir / name) as writer:
            for row in rows:
                for metric in metric_list:
                    writer.add_scalar(f"test/{metric.name}", row[f"test_{metric.name}"], row["epoch"] or 0)
        if args.save_per_image:
            ddp.write_csv(folder / "per_image.csv",
                          [{"checkpoint": path.name, **row} for _, path, owner, result in results if owner == name
                           for row in result.rows()])
    ddp.write_csv(output_dir / "results.csv", [
        {"checkpoint": path.name, "set": name, "metric": metric, "value": value, "pictures": result.counted[metric],
         "left_out": result.left_out[metric], "fingerprint": test_sets[name].fingerprint}
        for _, path, name, result in results for metric, value in result.values.items()])

    header = ["set", "checkpoint", *(metric.name for metric in metric_list)]
    table = [[name, path.name + (" *" if path == best and len(means) > 1 else ""), *result.values.values()]
             for name in test_sets for _, path, owner, result in results if owner == name]
    say("\n" + metrics.format_table(header, table))
    if len(means) > 1 and best:
        say(f"* best checkpoint by the mean {first} over the sets: {best} ({means[best]:.4f})")
    say(f"results in {output_dir / 'results.csv'}")


if __name__ == "__main__":
    run(lambda: main(args, model_args))
