"""Test one checkpoint under attacks of growing strength.

    python test_robust.py --model MyModel --test_data_path CASIA1 --checkpoint_path output --if_resizing ...
    torchrun --standalone --nproc_per_node=4 test_robust.py --model MyModel --test_data_path CASIA1 ...

Pictures are attacked as decoded, before resizing or padding. Writes to --output_dir: per attack a folder with log.txt
and TensorBoard curves over the strength; results.csv (one row per dataset, attack, strength and metric). Prints one
table at the end.
"""
from registry import build_model, parse_args, post_function, run, script_parser, UserError


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
    names = [attack.name for attack in attacks]
    if len(set(names)) < len(names):
        raise UserError(f"two attacks share a name ({', '.join(names)}), under which results are kept: give one "
                        "another, attack.name = \"...\".")
    output_dir = ddp.start_testing(args, model_args)
    log_dir = ddp.make_output_dir(args.log_dir or args.output_dir, "--log_dir")

    # Data, checkpoint, model
    options = data.dataset_options(args, post_function(args.model, model_args), is_main())
    with ddp.together():
        model = build_model(args.model, model_args).to(device)
        path = ddp.newest_for_testing(model, args, model_args)
        test_sets = data.open_sets(args.test_data_path, "--test_data_path", **options)
    for name, test_set in test_sets.items():
        say(f"testing on {name}:", test_set.describe())
    move = functools.partial(data.to_device, device=device, padding=args.if_padding)

    # Every attack on every set; a picture is decoded once per attack, and each result is written as soon as it is there
    rows, table = [], []  # rows of results.csv: one per set, attack, strength and metric
    for name, test_set in test_sets.items():
        for attack in attacks:
            say(f"{name}: {attack!r}")
            test_set.attacks = list(attack)
            loader = data.eval_loader(test_set, args.test_batch_size, args.num_workers, args.pin_mem, ddp.rank(),
                                      ddp.world_size())
            results = metrics.evaluate(model, loader, metric_list, move, amp=not args.if_not_amp,
                                       model_eval=not args.no_model_eval, expected=len(test_set),
                                       variants=len(test_set.attacks), model_name=args.model)
            place = f"{name}/{attack.name}" if len(test_sets) > 1 else attack.name
            about = {"checkpoint": path.name, "fingerprint": test_set.fingerprint}
            for strength, result in zip(attack.strengths, results):
                say(f"  strength {strength}  {result.describe()}")
                table.append([place, strength, *result.values.values()])
                rows += [{"set": name, "attack": attack.name, "unit": attack.strength_unit, "strength": strength,
                          "metric": metric, "value": value, "pictures": result.counted[metric],
                          "left_out": result.left_out[metric], **about} for metric, value in result.values.items()]
            if is_main():
                write_result(output_dir / place, log_dir / place, attack, results, about)
                ddp.write_csv(output_dir / "results.csv", rows)

    say("\n" + metrics.format_table(["attack", "strength", *(metric.name for metric in metric_list)], table))
    say(f"results in {output_dir / 'results.csv'}")
    ddp.cleanup()


def write_result(folder, log_dir, attack, results, about):
    """Write log.txt and the curves of one attack. TensorBoard's steps are whole numbers: fractional strengths are
    counted from 0 there."""
    ddp.write_lines(ddp.make_output_dir(folder) / "log.txt", [
        {"strength": strength, "unit": attack.strength_unit,
         **{f"test_{name}": value for name, value in result.values.items()}, **about}
        for strength, result in zip(attack.strengths, results)])
    whole = all(float(strength).is_integer() for strength in attack.strengths)
    with ddp.tensorboard(log_dir, fresh=True) as writer:
        for place, (strength, result) in enumerate(zip(attack.strengths, results)):
            for metric, value in result.values.items():
                writer.add_scalar(f"test/{metric}", value, int(strength) if whole else place)


if __name__ == "__main__":
    run(lambda: main(args, model_args))
