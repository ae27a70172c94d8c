"""Test one checkpoint under attacks of growing strength.

    python test_robust.py --model MyModel --test_data_path CASIA1 --checkpoint_path output --if_resizing ...
    torchrun --standalone --nproc_per_node=4 test_robust.py --model MyModel --test_data_path CASIA1 ...

Pictures are attacked as decoded, before resizing or padding. Writes to --output_dir: per attack a folder with log.txt
and TensorBoard curves over the strength; results.csv (one row per dataset, attack, strength and metric). Prints one
table at the end.
"""
from registry import build_model, parse_args, post_function, run, script_parser


def get_args():
    parser = script_parser(__doc__, output_dir="output_robust")
    group = parser.add_argument_group("testing")
    group.add_argument("--test_data_path", "--test_data_json", required=True,
                       help="test set, or a JSON object {name: path} of several")
    group.add_argument("--checkpoint_path", required=True,
                       help="checkpoint file, or a folder: the newest checkpoint-<n>.pth in it")
    group.add_argument("--noise_unit", choices=["variance", "std"], default="variance",
                       help="what the strength of the noise is, on the 0-255 scale: variance as in IMDL-BenCo, or "
                            "standard deviation as in most papers")
    return parse_args(parser)


if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes answer at once
    args, model_args = run(get_args)

import functools

import data
import ddp
import metrics
from ddp import is_main, say


def main(args, model_args):
    device = ddp.init(args)
    metric_list = [
        # TODO the metrics to compute: PixelF1, PixelIOU, PixelAccuracy, PixelAUC (each with mode="origin", "reverse" or
        # "double"), ImageF1, ImageAUC, ImageAccuracy, or a class of your own with their interface
        metrics.PixelF1(threshold=0.5),
        metrics.PixelIOU(threshold=0.5),
    ]
    attacks = [
        # TODO the attacks and their strengths, 0 = no attack: the three below, or a subclass of data.AttackWrapper of
        # your own
        data.GaussianBlurWrapper([0, 3, 7, 11, 15, 19, 23]),
        data.GaussianNoiseWrapper([3, 7, 11, 15, 19, 23], unit=args.noise_unit, seed=args.seed),
        data.JpegCompressionWrapper([50, 60, 70, 80, 90, 100]),
    ]
    metric_list = metrics.choose(args.metrics, metric_list, args.if_predict_label)
    output_dir, log_dir = ddp.start_testing(args, model_args)

    # Data, checkpoint, model
    options = data.dataset_options(args, post_function(args.model, model_args), is_main())
    with ddp.together():
        test_sets = data.open_sets(args.test_data_path, "--test_data_path", **options)
    for name, test_set in test_sets.items():
        say(f"testing on {name}:", test_set.describe())
    path = ddp.find_checkpoints(args.checkpoint_path, "--checkpoint_path")[-1]
    say(f"checkpoint {path}")
    model = build_model(args.model, model_args).to(device)
    ddp.load_weights(model, ddp.load_checkpoint(path, "--checkpoint_path"), path, "--checkpoint_path")
    move = functools.partial(data.to_device, device=device, padding=args.if_padding)

    # Every attack on every set; a picture is decoded once per attack
    results = []  # one dict per set, attack, strength and metric
    for name, test_set in test_sets.items():
        for attack in attacks:
            say(f"{name}: {attack!r}")
            test_set.attacks = list(attack)
            loader = data.eval_loader(test_set, args.test_batch_size, args.num_workers, args.pin_mem, ddp.rank(),
                                      ddp.world_size())
            by_strength = metrics.evaluate(model, loader, metric_list, move, amp=not args.if_not_amp,
                                           model_eval=not args.no_model_eval, expected=len(test_set),
                                           variants=len(test_set.attacks), model_name=args.model)
            for (strength, _), result in zip(test_set.attacks, by_strength):
                say(f"  strength {strength}  {result.describe()}")
                results += [{"set": name, "attack": attack.name, "unit": attack.strength_unit, "strength": strength,
                             "metric": metric, "value": value,
                             "pictures": result.counted[metric], "left_out": result.left_out[metric],
                             "checkpoint": path.name,
                             "fingerprint": test_set.fingerprint} for metric, value in result.values.items()]

    if is_main():
        write_results(results, [metric.name for metric in metric_list], output_dir, log_dir)
    ddp.cleanup()


def write_results(results, names, output_dir, log_dir):
    """Write logs, curves over the strength and results.csv, and print the table."""
    several = len({row["set"] for row in results}) > 1
    groups = {}  # (set, attack) -> {strength: {metric: value}}
    for row in results:
        groups.setdefault((row["set"], row["attack"]), {}).setdefault(row["strength"], {})[row["metric"]] = row["value"]
    table = []
    for (owner, attack), strengths in groups.items():
        place = f"{owner}/{attack}" if several else attack
        folder = ddp.make_output_dir(output_dir / place)
        ddp.write_lines(folder / "log.txt", [{"strength": strength, **{f"test_{k}": v for k, v in values.items()}}
                                             for strength, values in strengths.items()])
        with ddp.tensorboard(log_dir / place) as writer:
            for strength, values in strengths.items():
                for metric, value in values.items():
                    writer.add_scalar(f"test/{metric}", value, strength)
                table.append([place, strength, *(values[name] for name in names)])
    ddp.write_csv(output_dir / "results.csv", results)
    say("\n" + metrics.format_table(["attack", "strength", *names], table))
    say(f"results in {output_dir / 'results.csv'}")


if __name__ == "__main__":
    run(lambda: main(args, model_args))
