"""Train a model, evaluate it every few epochs, and keep the newest and the best checkpoint.

    python train.py --model MyModel --data_path CASIA2 --test_data_path CASIA1 --if_resizing --image_size 256
    torchrun --standalone --nproc_per_node=4 train.py --model MyConvNeXt --data_path CASIA2 --if_resizing ...
    python train.py --model MyConvNeXt --help           # the flags below and those of the model
    python train.py ... --resume auto                   # go on where the newest checkpoint of --output_dir stopped

Writes to --output_dir: checkpoint-<epoch>.pth (the newest, the best, and every --save_period), log.txt (one JSON object
per epoch) and TensorBoard events; inside an epoch, after SIGTERM, Ctrl-C and every --save_every_minutes, also
checkpoint-<epoch>-unfinished.pth. The same command runs on a CPU, on one GPU, and under torchrun on several GPUs and
machines.
"""
import signals  # first: the others take seconds

import math

import torch

import data
import ddp
import metrics
from checkpoint import (find_resume, frozen_hashes, load_checkpoint, refuse_broken_weights, resume_training,
                        save_checkpoint)
from evaluate import check_output, evaluate, evaluation_options
from log import (EpochLog, add_hyperparameters, forget_rows_from, format_table, open_output, record, remove_file, say,
                 say_places, tensorboard)
from panels import Watch, rows_of, write_rows
from registry import (UserError, build_model, counted, exit_on_user_error, natural, parse_args, positive, post_function,
                      rate, script_parser, visible, without_starting_weights)
from results import lower_is_better


def get_args():
    parser = script_parser(__doc__, trains=True, output_dir="output")
    group = parser.add_argument_group("training")
    group.add_argument("--data_path", required=True,
                       help="training set: folder with Tp/ and Gt/, JSON of pairs, or JSON of balanced sets")
    group.add_argument("--test_data_path", default=None,
                       help="test set, or a JSON object {name: path} of several; none = no evaluation")
    group.add_argument("--sample_number", type=positive, default=1840,
                       help="images per set and epoch of a JSON of balanced sets (default: %(default)s)")
    group.add_argument("--batch_size", type=positive, default=1,
                       help="images per process and step (default: %(default)s)")
    group.add_argument("--accum_iter", type=positive, default=1,
                       help="steps whose gradients are added up before the weights change (default: %(default)s)")
    group.add_argument("--epochs", type=positive, default=200, help="number of epochs in all (default: %(default)s)")
    group.add_argument("--start_epoch", type=natural, default=0, help="number of the first epoch; --resume sets it")
    group.add_argument("--resume", default=None, help="go on from a checkpoint (file, or folder: its newest), whose "
                                                      "flags this run's override; auto = the newest undamaged "
                                                      "one of output_dir")
    group.add_argument("--find_unused_parameters", action="store_true",
                       help="for models that leave parameters without gradient in some steps")
    group = parser.add_argument_group("optimizer")
    group.add_argument("--lr", type=rate, default=None,
                       help="peak learning rate; when not given: blr x effective batch size / 256")
    group.add_argument("--blr", type=rate, default=1e-3,
                       help="learning rate for an effective batch (batch_size x accum_iter x processes) of 256 "
                            "(default: %(default)s)")
    group.add_argument("--min_lr", type=rate, default=0.0,
                       help="learning rate at the end of the half cosine (default: %(default)s)")
    group.add_argument("--weight_decay", type=rate, default=0.05,
                       help="AdamW weight decay, not on biases and norms (default: %(default)s)")
    group.add_argument("--warmup_epochs", type=rate, default=4,
                       help="epochs over which the learning rate rises from 0 (default: %(default)s)")
    group.add_argument("--clip_grad", type=rate, default=None, metavar="NORM",
                       help="scale gradients down to this norm where theirs is larger (default: never)")
    group = parser.add_argument_group("speed")
    group.add_argument("--channels_last", action="store_true",
                       help="keep the channels of convolutions side by side in memory, which suits tensor cores")
    group.add_argument("--compile", action="store_true",
                       help="compile the model by torch.compile: minutes at the start, then faster steps")
    group = parser.add_argument_group("logging and saving")
    group.add_argument("--test_period", type=positive, default=4,
                       help="evaluate every N epochs and after the last (default: %(default)s)")
    group.add_argument("--save_period", type=natural, default=25,
                       help="keep the checkpoint of every N-th epoch; 0 = only newest and best (default: %(default)s)")
    group.add_argument("--save_every_minutes", type=rate, default=None, metavar="N",
                       help="keep a checkpoint inside the epoch, too, for --resume auto (default: only after SIGTERM "
                            "and Ctrl-C)")
    group.add_argument("--save_trainable_only", action="store_true",
                       help="checkpoints leave out the frozen parameters, which come from the same flags when loaded")
    group.add_argument("--log_per_epoch_count", type=positive, default=20,
                       help="progress lines per epoch (default: %(default)s)")
    return parse_args(parser)


def train_transform():
    """Return the training augmentation, IMDL-BenCo's, of the uint8 image and mask before resizing or padding."""
    import albumentations as albu  # here: it takes seconds, and only training needs it

    from transforms import RandomCopyMove, RandomGaussianBlur, RandomInpainting, RandomJpegCompression, RandomScale
    # TODO change the augmentation: any albumentations transform, and those of transforms.py
    return albu.Compose([
        RandomScale(scale_limit=0.2, p=1.0),
        RandomCopyMove(p=0.1),
        RandomInpainting(p=0.1),
        albu.HorizontalFlip(p=0.5),
        albu.VerticalFlip(p=0.5),
        albu.RandomBrightnessContrast(brightness_limit=(-0.1, 0.1), contrast_limit=0.1, p=1.0),
        RandomJpegCompression(quality_range=(70, 100), p=0.2),
        albu.RandomRotate90(p=0.5),
        RandomGaussianBlur(kernel_range=(3, 7), p=0.2),
    ])


def make_optimizer(model, weight_decay, lr):
    """Return the optimizer; the loop scales the learning rate of every parameter group by the schedule."""
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # names of parameters
    unknown = sorted(set(exempt) - {name for name, _ in model.named_parameters()})
    if unknown:
        raise UserError(f"no_weight_decay() of {type(model).__name__} names {', '.join(unknown)}, which are no "
                        "parameters of the model; return names of named_parameters().")
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": weight_decay}]
    for name, p in model.named_parameters():
        decays = weight_decay and p.ndim > 1 and not name.endswith(".bias") and name not in exempt
        groups[bool(decays)]["params"] += [p] * p.requires_grad
    groups, fused = [group for group in groups if group["params"]], p.is_cuda  # fused, a step doesn't wait for the GPU
    # TODO change the optimizer: any torch.optim class; a parameter group may have an "lr" or an "lr_scale" of its own
    return torch.optim.AdamW(groups, lr=lr, fused=fused)


def rate_shares(optimizer, peak):
    """Return each parameter group's share of the schedule's learning rate: its "lr" / `peak`, times its "lr_scale"."""
    groups = getattr(optimizer, "param_groups", ())
    if not groups or not all("lr" in group for group in groups):
        raise UserError(f"{type(optimizer).__name__} of make_optimizer has {len(groups)} parameter groups, and each "
                        "needs an \"lr\", which the schedule scales: return a torch.optim optimizer over the model's "
                        "parameters.")
    return [(group["lr"] / peak if peak else 1.0) * group.get("lr_scale", 1.0) for group in groups]


def learning_rate(epoch, epochs, warmup_epochs, peak, lowest):
    """Return the learning rate at a fractional epoch: linear warm-up to `peak`, then half a cosine down to `lowest`."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    share = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * min(share, 1)))


def evaluate_sets(model, test_sets, metric_list, writer, epoch, options):
    """Evaluate on every test set; return log entries: `test_<metric>` (mean over the sets), and with several
    `test_<set>/<metric>`. KeyboardInterrupt after the batch in which a signal has come."""
    row, values = {}, {metric.name: [] for metric in metric_list}
    for name, test_set in test_sets.items():
        watch = Watch(test_set)

        def after_batch(batch, output):
            if signals.asked:
                raise KeyboardInterrupt
            watch(batch, output)

        result, = evaluate(model, test_set, metric_list, label=f"testing {name}", on_batch=after_batch, **options)
        watch.write(writer, f"test {name}", epoch)
        say(f"Test: [{epoch}]  {name}  {result.describe()}")
        for metric, value in result.values.items():
            values[metric].append(value)
            if len(test_sets) > 1:
                row[f"test_{name}/{metric}"] = value
    for metric, column in values.items():
        defined = [value for value in column if not math.isnan(value)]
        row[f"test_{metric}"] = sum(defined) / len(defined) if defined else math.nan
    return row


def is_better(value, best):
    """Tell whether a value is better than that of `best`, if it has one; some metrics count errors."""
    sign = -1 if lower_is_better(best["metric"]) else 1
    return not math.isnan(value) and (best["epoch"] is None or sign * value > sign * best["value"])


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
    resume = find_resume(args.resume, output_dir)

    # Data
    with ddp.fail_together(patiently=True):
        train_set = data.open_dataset(args.data_path, "--data_path",
                                      allowed=("ManiDataset", "JsonDataset", "BalancedDataset"),
                                      sample_number=args.sample_number, transform=train_transform(), **dataset_options)
        test_sets = {}
        if args.test_data_path:
            test_sets = data.open_sets(args.test_data_path, "--test_data_path", **dataset_options)
    say("training on", train_set.describe())
    for name, test_set in test_sets.items():
        say(f"testing on {name}:", test_set.describe())
    fingerprints = {name: dataset.fingerprint for name, dataset in {"train": train_set, **test_sets}.items()}
    batches = data.TrainBatches(train_set, args.batch_size, args.seed, ddp.rank(), ddp.world_size())
    with ddp.fail_together():
        loader = data.make_loader(train_set, batches, args.num_workers, args.pin_mem, persistent=True)

    # Model
    ddp.seed_everything(args.seed)
    with ddp.fail_together(patiently=True):
        whole = (resume and not args.save_trainable_only
                 and not load_checkpoint(resume, "--resume").get("frozen_hashes"))
        build_args = without_starting_weights(args.model, model_args) if whole else model_args
        raw_model = build_model(args.model, build_args).to(device)
    count = sum(p.numel() for p in raw_model.parameters())
    trainable = sum(p.numel() for p in raw_model.parameters() if p.requires_grad)
    say(f"model {args.model}: {count:,} parameters, {trainable:,} of them trainable; "
        f"{counted(ddp.world_size(), 'process', 'processes')} on {device.type}")
    with ddp.fail_together():
        if trainable == 0:
            raise UserError(f"--model {args.model}: the model has no trainable parameter, so there is nothing to "
                            "train.")
    if args.save_trainable_only and trainable == count:
        say(f"note: --save_trainable_only: {args.model} has no frozen parameter, so checkpoints hold all")
        args.save_trainable_only = False
    if args.channels_last:
        raw_model.to(memory_format=torch.channels_last)
    model = ddp.wrap(raw_model, device, args.find_unused_parameters)
    forward = torch.compile(model) if args.compile else model

    # Optimizer and schedule
    effective_batch = args.batch_size * args.accum_iter * ddp.world_size()
    peak = args.lr if args.lr is not None else args.blr * effective_batch / 256
    steps = counted(len(batches), "step")
    say(f"peak learning rate {peak:.2e}, effective batch size {effective_batch}, {steps} per epoch")
    with ddp.fail_together():
        optimizer = make_optimizer(raw_model, args.weight_decay, peak)
        shares = rate_shares(optimizer, peak)
    autocast, scales = ddp.mixed_precision(args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=scales)
    left_out = frozen_hashes(raw_model) if args.save_trainable_only else {}
    order = {"--seed": args.seed, "--batch_size": args.batch_size, "--accum_iter": args.accum_iter,
             "processes": ddp.world_size(), "images": len(train_set)}
    if train_set.fingerprint != data.NOT_COMPUTED:  # rank 0's
        order["fingerprint"] = train_set.fingerprint
    start_epoch, best, begun, last_row = resume_training(resume, raw_model, optimizer, scaler, args, model_args,
                                                         metric_list[0].name, order)
    with ddp.fail_together():
        if resume and left_out and left_out != frozen_hashes(raw_model):
            raise UserError(f"--save_trainable_only: the frozen weights of --resume {resume} are not those that these "
                            "flags and --seed give, so they would be lost: leave it out, or give the training's flags.")
    former_best, log = best["epoch"], output_dir / "log.txt"
    logged = forget_rows_from(log, start_epoch)
    agreement = ddp.Agreement(args.save_every_minutes)

    def save(path, **more):
        """Write a checkpoint, on rank 0; `more` is what tells one of inside an epoch from an epoch's."""
        if ddp.is_main():
            state = {name: value for name, value in raw_model.state_dict().items() if name not in left_out}
            save_checkpoint(path, {"model": state, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                                   "epoch": epoch, "best": best, "args": {**vars(args), **model_args},
                                   "fingerprint": fingerprints, "frozen_hashes": left_out, **more})

    with tensorboard(log_dir, purge_step=start_epoch if resume else None) as writer:
        if writer:
            add_hyperparameters(writer, {**vars(args), **model_args}, [metric.name for metric in metric_list])
        if writer and last_row and last_row["epoch"] not in logged:  # the run ended between saving and logging it
            record(last_row, log, writer)
        for epoch in range(start_epoch, args.epochs):
            # One epoch of training
            progress = EpochLog(f"Epoch: [{epoch}]", len(batches), args.log_per_epoch_count, scaler, begun)
            begun, batch, unfinished = None, None, output_dir / f"checkpoint-{epoch}-unfinished.pth"
            batches.set_epoch(epoch, progress.steps)
            model.train()
            signals.wait = True
            for step, batch in progress.each(loader):
                group_start = step - step % args.accum_iter
                group_size = min(args.accum_iter, len(batches) - group_start)  # an epoch's last group may be smaller
                last_of_group = step == group_start + group_size - 1
                lr = learning_rate(epoch + group_start / len(batches), args.epochs, args.warmup_epochs, peak,
                                   args.min_lr)
                for param_group, share in zip(optimizer.param_groups, shares):
                    param_group["lr"] = lr * share
                ddp.seed_everything(args.seed, epoch, step)  # so that a resumed run needs no stored random states

                # forward and backward
                batch = data.to_device(batch, device)
                model.require_backward_grad_sync = last_of_group  # DDP averages once for all accumulated gradients
                with autocast():
                    output = forward(**batch)
                if step == 0:
                    check_output(output, batch, metric_list if test_sets else (), args.model, training=True)
                loss = output["backward_loss"]
                scaler.scale(loss / group_size).backward()
                losses = {"total_loss": loss, **(output.get("visual_loss") or {})}  # the model's own keys win

                # weights
                norm = None
                if last_of_group:
                    scaler.unscale_(optimizer)
                    norm = torch.nn.utils.get_total_norm(p.grad for p in raw_model.parameters() if p.grad is not None)
                    if args.clip_grad is not None:
                        torch.nn.utils.clip_grads_with_norm_(raw_model.parameters(), args.clip_grad, norm)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
                progress.update(losses, lr, norm, batch["name"])

                # a checkpoint inside the epoch
                if last_of_group and (wish := agreement.wish(last=step + 1 == len(batches))):
                    refuse_broken_weights(raw_model, epoch)
                    save(unfinished, begun=progress.state(), order=order)
                    if wish > 1:
                        say(f"saved {unfinished} after step {step + 1} of {len(batches)}")
                        ddp.cleanup()  # when it is written
                        signals.end(wish)

            # Evaluate
            refuse_broken_weights(raw_model, epoch)
            losses, state = ddp.average(progress.means()), progress.state()
            row = {"epoch": epoch, "train_lr": progress.lr}
            row |= {f"train_{name}": value for name, value in losses.items()}
            if test_sets and ((epoch + 1) % args.test_period == 0 or epoch + 1 == args.epochs):
                ddp.share_buffers(raw_model)
                ddp.seed_everything(args.seed, epoch, len(batches))  # dropout with --no_model_eval
                try:
                    row |= evaluate_sets(raw_model, test_sets, metric_list, writer, epoch,
                                         evaluation_options(args, device))
                except BaseException:  # of another kind where this rank waited for one that a signal has ended
                    if signals.asked:
                        save(unfinished, begun=state, order=order)
                        signals.end(signals.asked)
                    raise
                value = row[f"test_{metric_list[0].name}"]
                if is_better(value, best):
                    best.update(epoch=epoch, value=value, folder=str(output_dir))

            # Save, then log, so that a disk that is full there loses no epoch
            row["fingerprint"] = fingerprints
            save(output_dir / f"checkpoint-{epoch}.pth", row=row)
            if writer:  # on rank 0
                outdated = [output_dir / f"checkpoint-{number}.pth" for number in (epoch - 1, former_best)
                            if number not in (epoch, best["epoch"], None)
                            and (not args.save_period or (number + 1) % args.save_period)]
                for path in (*outdated, *output_dir.glob("checkpoint-*-unfinished.pth")):
                    remove_file(path)
                if batch:
                    write_rows(writer, "train", rows_of(batch, output, range(min(4, len(batch["label"])))), epoch)
                record(row, log, writer, progress.speed())
            signals.heed()
            former_best = best["epoch"]

    say(f"\ntrained {args.model} on {visible(train_set.path)}; after epoch {args.epochs - 1}")
    if test_sets:
        places = {f"{name}/": name for name in test_sets if 1 < len(test_sets) <= 7}
        places[""] = "mean" if len(test_sets) > 1 else next(iter(test_sets))
        say(format_table(["set", *(metric.name for metric in metric_list[:8])],
                         [[shown, *(row.get(f"test_{place}{metric.name}") for metric in metric_list[:8])]
                          for place, shown in places.items()]))
    if best["epoch"] is not None:
        say(f"best {best['metric']}: {best['value']:.4f} at epoch {best['epoch']}, "
            f"in {best['folder']}/checkpoint-{best['epoch']}.pth")
    elif test_sets:
        say(f"no checkpoint is best: {best['metric']} is undefined on these test sets")
    say(f"newest checkpoint: {output_dir / 'checkpoint-'}{args.epochs - 1}.pth")
    say_places({log: "a line per epoch", log_dir: "curves and images, for runs/tensorboard.sh"})
    ddp.cleanup()


if __name__ == "__main__":
    exit_on_user_error(main)
