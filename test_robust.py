"""Test one checkpoint under attacks of growing strength.

    python test_robust.py --checkpoint_path output --test_data_path CASIA1
    torchrun --standalone --nproc_per_node=4 test_robust.py --checkpoint_path output --test_data_path CASIA1

What the command line leaves out (model, its flags, size) is taken from the checkpoint. Images are attacked as decoded,
before resizing or padding. Writes to --output_dir: per attack a folder with log.txt and TensorBoard curves over the
strength; results.csv (one row per dataset, attack, strength and metric, with a 95 % interval over the images), the same
as .json, .md and .tex. Prints the first metric over the strengths at the end.
"""
import signals  # first: the others take seconds

import sys

import data
import ddp
import metrics
from checkpoint import load_chosen, stored_args
from evaluate import evaluate, evaluation_options
from log import (csv_lines, first_lines, format_table, json_lines, open_output, say, say_places, tensorboard,
                 write_file)
from predictions import versions
from registry import UserError, build_model, counted, exit_on_user_error, parse_args, post_function, script_parser
from results import make_report, result_rows, write_results


def get_args():
    parser = script_parser(__doc__, output_dir="output_robust")
    group = parser.add_argument_group("testing")
    group.add_argument("--test_data_path", "--test_data_json", required=True,
                       help="test set, or a JSON object {name: path} of several")
    group.add_argument("--checkpoint_path", required=True,
                       help="checkpoint file, or a folder: its best checkpoint, or its newest if it records no best")
    group.add_argument("--attacks", nargs="+", default=None, metavar="NAME",
                       help="only these: GaussianBlur, GaussianNoise, JpegCompression (or what the list of the script "
                            "holds instead), or an attack class in a file below models/, by its name")
    group.add_argument("--noise_unit", choices=["variance", "std"], default="variance",
                       help="what the strength of the noise is, on the 0-255 scale: variance as in IMDL-BenCo, or "
                            "standard deviation as in most papers")
    group.add_argument("--attack_convention", choices=["exact", "imdlbenco"], default="exact",
                       help="imdlbenco: noise cut off instead of rounded, JPEG with red and blue swapped, as in the "
                            "curves published with it (default: %(default)s)")
    group.add_argument("--report", action="store_true",
                       help="also make a page of tables and curves, report.html (see tools/report.py)")
    return parse_args(parser, find_stored=stored_args)


def make_attacks(names, noise_unit, seed, convention):
    """Return the list of attacks, or those of `names`."""
    import transforms  # here: with albumentations, which takes seconds
    return transforms.choose_attacks(names, [
        # TODO the attacks and their strengths, 0 = no attack: the three below, or a subclass of
        # transforms.AttackWrapper of your own
        transforms.GaussianBlurWrapper([0, 3, 7, 11, 15, 19, 23]),
        transforms.GaussianNoiseWrapper([3, 7, 11, 15, 19, 23], unit=noise_unit, seed=seed, convention=convention),
        transforms.JpegCompressionWrapper([50, 60, 70, 80, 90, 100], convention=convention),
    ])


def main():
    args, model_args = get_args()
    metric_list = [
        # TODO the metrics to compute: any of README.md, "Metrics", other definitions by their mode,
        # PixelF1(mode="double"), or a class of your own with their interface
        metrics.PixelF1(threshold=0.5),
        metrics.PixelIOU(threshold=0.5),
    ]
    attacks = make_attacks(args.attacks, args.noise_unit, args.seed, args.attack_convention)
    metric_list = metrics.choose(args.metrics, metric_list, args.if_predict_label, args.threshold, args.score_from)
    device = ddp.init(args.device, args.dist_timeout)
    names = [attack.name for attack in attacks]
    if len(set(names)) < len(names):
        raise UserError(f"two attacks share a name ({', '.join(names)}), under which results are kept: give one "
                        "another, attack.name = \"...\".")
    dataset_options = data.dataset_options(args, post_function(args.model, model_args), ddp.is_main())
    output_dir, log_dir = open_output(args, model_args)
    ddp.seed_everything(args.seed)

    # Data, checkpoint, model
    with ddp.fail_together(patiently=True):
        model = build_model(args.model, model_args).to(device)
    path = load_chosen(model, args.checkpoint_path)
    with ddp.fail_together(patiently=True):
        test_sets = data.open_sets(args.test_data_path, "--test_data_path", **dataset_options)
    for name, test_set in test_sets.items():
        say(f"testing on {name}:", test_set.describe())

    # Every attack on every set; an image is decoded once per attack, and each result is written as soon as it is there
    rows, tables = [], []  # rows of results.csv: one per set, attack, strength and metric
    for name, test_set in test_sets.items():
        for attack in attacks:
            say(f"{name}: {attack!r}")
            test_set.attacks = list(attack)
            place = f"{name}/{attack.name}" if len(test_sets) > 1 else attack.name
            results = evaluate(model, test_set, metric_list, label=place, **evaluation_options(args, device))
            about = {"checkpoint": path.name, "fingerprint": test_set.fingerprint, "eval_size": args.eval_size}
            for strength, result in zip(attack.strengths, results):
                say(f"  strength {strength}  {result.describe()}")
                if ddp.is_main():
                    rows += result_rows(result, metric_list, {"set": name, "attack": attack.name, "unit":
                                                              attack.strength_unit, "strength": strength}, about)
            first = metric_list[0].name
            tables.append(format_table([f"{place} ({attack.strength_unit})", *map(str, attack.strengths)],
                                       [[first, *(result.values[first] for result in results)]]))
            if ddp.is_main():
                write_result(output_dir / place, log_dir / place, attack, results, about)
                write_file(output_dir / "results.csv", csv_lines(rows))

    if ddp.is_main():
        write_results(output_dir, rows, {"command": sys.argv, "versions": versions()})
    if args.report:
        make_report(output_dir, args)
    say("\n" + first_lines("\n".join(tables), 10, output_dir / "results.md"))
    say(f"tested {args.model}, {path}, under {counted(len(attacks), 'attack')} on {counted(len(test_sets), 'set')}")
    say_places({output_dir / "results.csv": "all values, with 95 % intervals; also as .json, .md and .tex",
                **({output_dir / "report.html": "a page of tables and curves"} if args.report else {}),
                log_dir: "curves over the strengths, for runs/tensorboard.sh"})
    ddp.cleanup()


def write_result(folder, log_dir, attack, results, about):
    """Write log.txt and the curves of one attack. TensorBoard's steps are whole numbers: fractional strengths are
    counted from 0 there."""
    write_file(folder / "log.txt", json_lines([
        {"strength": strength, "unit": attack.strength_unit,
         **{f"test_{name}": value for name, value in result.values.items()}, **about}
        for strength, result in zip(attack.strengths, results)]))
    whole = all(float(strength).is_integer() for strength in attack.strengths)
    with tensorboard(log_dir, fresh=True) as writer:
        for place, (strength, result) in enumerate(zip(attack.strengths, results)):
            for metric, value in result.values.items():
                writer.add_scalar(f"test/{metric}", value, int(strength) if whole else place)


if __name__ == "__main__":
    exit_on_user_error(main)
