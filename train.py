"""Train a model, evaluate it every few epochs, and keep the newest and the best checkpoint.

    python train.py --model MyModel --data_path CASIA2 --test_data_path CASIA1 --if_resizing --image_size 256
    torchrun --standalone --nproc_per_node=4 train.py --model MyConvNeXt --data_path CASIA2 --if_resizing ...
    python train.py --model MyConvNeXt --help           # the flags below and those of the model
    python train.py ... --resume auto                   # go on where the newest checkpoint of --output_dir stopped

Writes to --output_dir: checkpoint-<epoch>.pth (the newest, the best, and every --save_period), log.txt (one JSON object
per epoch) and TensorBoard events. The same command runs on a CPU, on one GPU, and under torchrun on several GPUs and
machines.
"""
from registry import build_model, natural, parse_args, positive, post_function, rate, run, script_parser, UserError


def get_args():
    parser = script_parser(__doc__, output_dir="output")
    group = parser.add_argument_group("training")
    group.add_argument("--data_path", required=True,
                       help="training set: folder with Tp/ and Gt/, JSON of pairs, or JSON of balanced sets")
    group.add_argument("--test_data_path", default=None,
                       help="test set, or a JSON object {name: path} of several; none = no evaluation")
    group.add_argument("--sample_number", type=positive, default=1840,
                       help="pictures per set and epoch of a JSON of balanced sets (default: %(default)s)")
    group.add_argument("--batch_size", type=positive, default=1,
                       help="pictures per process and step (default: %(default)s)")
    group.add_argument("--accum_iter", type=positive, default=1,
                       help="steps whose gradients are added up before the weights change (default: %(default)s)")
    group.add_argument("--epochs", type=positive, default=200, help="number of epochs in all (default: %(default)s)")
    group.add_argument("--start_epoch", type=natural, default=0, help="number of the first epoch; --resume sets it")
    group.add_argument("--resume", default=None, help="go on from a checkpoint (file, or folder: its newest); "
                                                      "auto = the newest of output_dir, if any")
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
    group = parser.add_argument_group("logging and saving")
    group.add_argument("--test_period", type=positive, default=4,
                       help="evaluate every so many epochs, and after the last (default: %(default)s)")
    group.add_argument("--save_period", type=natural, default=25,
                       help="keep every so many epochs' checkpoint; 0 = only newest and best (default: %(default)s)")
    group.add_argument("--log_per_epoch_count", type=positive, default=20,
                       help="progress lines per epoch (default: %(default)s)")
    return parse_args(parser)


if __name__ == "__main__":  # before the heavy imports, so that --help and mistakes answer at once
    args, model_args = run(get_args)

import contextlib
import functools
import json
import math

import albumentations as albu
import timm.optim
import torch

import data
import ddp
import metrics
from ddp import is_main, say


def train_transform():
    """Return the training augmentation, applied to the uint8 picture and mask before resizing or padding."""
    # TODO change the augmentation: any albumentations transform, and data.RandomCopyMove and data.RandomInpainting,
    # which tamper further
    return albu.Compose([
        albu.RandomScale(scale_limit=0.2, p=1.0),
        data.RandomCopyMove(p=0.1),
        data.RandomInpainting(p=0.1),
        albu.HorizontalFlip(p=0.5),
        albu.VerticalFlip(p=0.5),
        albu.RandomBrightnessContrast(brightness_limit=(-0.1, 0.1), contrast_limit=0.1, p=1.0),
        albu.ImageCompression(quality_range=(70, 100), p=0.2),
        albu.RandomRotate90(p=0.5),
        albu.GaussianBlur(blur_limit=(3, 7), p=0.2),
    ])


def learning_rate(epoch, epochs, warmup_epochs, peak, lowest):
    """Return the learning rate at a fractional epoch: linear warm-up to `peak`, then half a cosine down to `lowest`."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    share = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * min(share, 1)))


def prepare_output(args):
    """Make the output folder and find what to resume from; return (output_dir, log_dir, checkpoint to resume or None).

    An earlier run's checkpoints are neither overwritten nor mixed in.
    """
    with ddp.together():
        output_dir = ddp.make_output_dir(args.output_dir)
        log_dir = ddp.make_output_dir(args.log_dir or args.output_dir, "--log_dir")
    earlier = [p for p in output_dir.glob("checkpoint-*.pth") if ddp.checkpoint_epoch(p) is not None]
    resume = args.resume
    if resume == "auto":
        resume = output_dir if earlier else None
        if resume is None:
            say(f"--resume auto: no checkpoint in {output_dir}, so training starts at the beginning")
    with ddp.together():
        resume = ddp.find_checkpoints(resume, "--resume")[-1] if resume else None
    found = ddp.gather(resume and resume.name)
    if len(set(found)) > 1:  # several machines, each with a disk of its own
        raise UserError(f"--resume {args.resume}: the processes find different checkpoints "
                        f"({', '.join(map(str, found))}). Copy the newest to the same place on every machine, or "
                        "share --output_dir.")
    newest = max(earlier, key=ddp.checkpoint_epoch, default=None)
    if newest and resume and resume.parent.resolve() == output_dir.resolve():
        if resume.name != newest.name:
            raise UserError(f"--resume {resume}: {output_dir} holds later checkpoints up to {newest.name}, which would "
                            "get mixed with new ones: move them away, or give another --output_dir.")
    elif newest:
        raise UserError(f"--output_dir {output_dir} holds {len(earlier)} checkpoints of an earlier run: give --resume "
                        "auto to go on with it, or another --output_dir.")
    return output_dir, log_dir, resume


def restore(checkpoint, path, optimizer, scaler, best, args):
    """Restore optimizer, loss scaler and random states from a checkpoint of ours; return (next epoch, best so far)."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, flags in zip(optimizer.param_groups, settings):
            group.update(flags)  # what the command line says now goes before what it said then
        if checkpoint.get("scaler"):  # empty in a checkpoint from a run without mixed precision
            scaler.load_state_dict(checkpoint["scaler"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"--resume {path}: its optimizer state doesn't fit this optimizer ({error}). Resume with the "
                        "same optimizer, or keep only the weights: torch.save({'model': ...}).") from None
    ddp.note_changes(checkpoint, path, {name: value for name, value in vars(args).items()
                                        if name not in ("resume", "start_epoch", "num_workers", "output_dir")})
    states = checkpoint.get("rng") or []
    if len(states) == ddp.world_size():
        ddp.set_random_states(states[ddp.rank()])
    else:
        say(f"note: {path.name} holds the random states of {len(states)} process(es), not of {ddp.world_size()}, so "
            "they start anew")
    stored = checkpoint.get("best") or best
    if stored["metric"] != best["metric"]:
        say(f"note: the best score of {path.name} was of {stored['metric']}; the best {best['metric']} is looked for "
            "from here on")
        stored = best
    if (path.parent / f"checkpoint-{stored['epoch']}.pth").exists():  # the folder may have been moved
        stored["folder"] = str(path.parent)
    return checkpoint.get("epoch", args.start_epoch - 1) + 1, stored


def forget_rows_from(path, epoch):
    """Take the rows of epochs that will be trained again out of log.txt; a run that was killed may have logged more
    than it saved."""
    if is_main() and path.exists():
        rows = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if row_epoch(line) < epoch]
        ddp.write_atomically(path, lambda temporary: temporary.write_text("".join(rows), encoding="utf-8"))


def row_epoch(line):
    """Return the epoch of a line of log.txt; infinity for a line that was cut off."""
    try:
        return json.loads(line)["epoch"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


def write_pictures(writer, tag, batch, output, step):
    """Write up to four pictures of a batch to TensorBoard.

    They are the input, the mask, the prediction, the prediction above 0.5, and every visual_image.
    """
    pictures = {"image": data.denormalise(batch["image"]), "mask": batch["mask"]}
    if output.get("pred_mask") is not None:
        pictures |= {"pred_mask": output["pred_mask"], "pred_mask above 0.5": output["pred_mask"] > 0.5}
    for name, value in (output.get("visual_image") or {}).items():
        pictures[f"visual_image {name}"] = value
    for name, value in pictures.items():
        writer.add_images(f"{tag}/{name}", value[:4].detach().float().clamp(0, 1), step)


def evaluate_sets(model, test_sets, metric_list, move, writer, epoch, args):
    """Evaluate on every test set; return log entries: `test_<metric>` (mean over the sets), and with several
    `test_<set>/<metric>`."""
    row, values = {}, {metric.name: [] for metric in metric_list}
    for name, test_set in test_sets.items():
        shown = []  # one entry when the set's first batch is in TensorBoard

        def show_first(batch, output, _):
            if writer and not shown:
                write_pictures(writer, f"test {name}", batch, output, epoch)
                shown.append(name)

        loader = data.eval_loader(test_set, args.test_batch_size, args.num_workers, args.pin_mem, ddp.rank(),
                                  ddp.world_size())
        result, = metrics.evaluate(model, loader, metric_list, move, amp=not args.if_not_amp,
                                   model_eval=not args.no_model_eval, expected=len(test_set), on_batch=show_first,
                                   model_name=args.model)
        say(f"Test: [{epoch}]  {name}  {result.describe()}")
        for metric, value in result.values.items():
            values[metric].append(value)
            if len(test_sets) > 1:
                row[f"test_{name}/{metric}"] = value
    for metric, column in values.items():
        defined = [value for value in column if not math.isnan(value)]
        row[f"test_{metric}"] = sum(defined) / len(defined) if defined else math.nan
    return row


def remove_outdated(output_dir, epochs, save_period):
    """Remove the checkpoints of these epochs, which are no longer newest or best, unless --save_period keeps them."""
    for epoch in epochs - {None}:
        if not save_period or (epoch + 1) % save_period:
            (output_dir / f"checkpoint-{epoch}.pth").unlink(missing_ok=True)


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
    options = data.dataset_options(args, post_function(args.model, model_args), is_main())
    output_dir, log_dir, resume = prepare_output(args)
    ddp.announce(args, model_args)
    ddp.seed_everything(args.seed)

    # Data
    with ddp.together():
        train_set = data.open_dataset(args.data_path, "--data_path",
                                      allowed=("ManiDataset", "JsonDataset", "BalancedDataset"),
                                      sample_number=args.sample_number, transform=train_transform(), **options)
        test_sets = data.open_sets(args.test_data_path, "--test_data_path", **options) if args.test_data_path else {}
    say("training on", train_set.describe())
    for name, test_set in test_sets.items():
        say(f"testing on {name}:", test_set.describe())
    fingerprints = {"train": train_set.fingerprint,
                    **{name: test_set.fingerprint for name, test_set in test_sets.items()}}
    batches = data.TrainBatches(train_set, args.batch_size, args.seed, ddp.rank(), ddp.world_size())
    train_loader = data.make_loader(train_set, batches, args.num_workers, args.pin_mem, persistent=True)
    move = functools.partial(data.to_device, device=device, padding=args.if_padding)

    # Model
    with ddp.together():
        raw_model = build_model(args.model, model_args).to(device)
    count = sum(p.numel() for p in raw_model.parameters())
    trainable = sum(p.numel() for p in raw_model.parameters() if p.requires_grad)
    say(f"model {args.model}: {count:,} parameters, {trainable:,} of them trainable; "
        f"{ddp.world_size()} process(es) on {device.type}")
    if trainable == 0:
        raise UserError(f"--model {args.model}: the model has no trainable parameter, so there is nothing to train.")
    model = ddp.wrap(raw_model, device, args.find_unused_parameters)

    # Optimizer and schedule
    effective_batch = args.batch_size * args.accum_iter * ddp.world_size()
    peak = args.lr if args.lr is not None else args.blr * effective_batch / 256
    say(f"peak learning rate {peak:.2e}, effective batch size {effective_batch}, {len(batches)} steps per epoch")
    # TODO change the optimizer: any torch.optim class; the loop sets the learning rate of every parameter group
    optimizer = torch.optim.AdamW(timm.optim.param_groups_weight_decay(raw_model, args.weight_decay), lr=peak,
                                  betas=(0.9, 0.95))
    use_amp = device.type == "cuda" and not args.if_not_amp
    scaler = torch.amp.GradScaler(device.type, enabled=use_amp)

    # Resume
    best = {"epoch": None, "value": -math.inf, "metric": metric_list[0].name, "folder": str(output_dir)}
    start_epoch = args.start_epoch
    if resume:
        with ddp.together():
            checkpoint = ddp.load_weights(raw_model, resume, "--resume")
        if "optimizer" in checkpoint:
            start_epoch, best = restore(checkpoint, resume, optimizer, scaler, best, args)
            say(f"resumed from {resume}: epoch {start_epoch} comes next")
        else:
            say(f"weights from {resume}; it holds no optimizer, so training starts at epoch {start_epoch}")
        del checkpoint
    if start_epoch >= args.epochs:
        raise UserError(f"nothing to train: by {'--resume ' + str(resume) if resume else '--start_epoch'} the next "
                        f"epoch is {start_epoch}, and --epochs is {args.epochs}. Raise --epochs.")

    with ddp.tensorboard(log_dir, purge_step=start_epoch if resume else None) as writer:
        forget_rows_from(output_dir / "log.txt", start_epoch)
        former_best = best["epoch"]
        for epoch in range(start_epoch, args.epochs):
            # -------------------------------------------------------------------------------------------------------
            # One epoch of training
            batches.set_epoch(epoch)
            model.train()
            progress = ddp.Progress(f"Epoch: [{epoch}]", len(batches), args.log_per_epoch_count)
            for step, batch in progress.each(train_loader):
                group_start = step - step % args.accum_iter
                group_size = min(args.accum_iter, len(batches) - group_start)  # an epoch's last group may be smaller
                last_of_group = step == group_start + group_size - 1
                lr = learning_rate(epoch + group_start / len(batches), args.epochs, args.warmup_epochs, peak,
                                   args.min_lr)
                for param_group in optimizer.param_groups:
                    param_group["lr"] = lr

                # forward
                batch = move({key: value for key, value in batch.items() if key != "index"})
                wait = contextlib.nullcontext() if last_of_group or model is raw_model else model.no_sync()
                with wait:
                    with torch.autocast(device.type, enabled=use_amp):
                        output = metrics.run_model(model, batch, args.model, metric_list if test_sets else (),
                                                   training=True)
                    loss = output["backward_loss"]

                    # backward
                    scaler.scale(loss / group_size).backward()
                losses = {**(output.get("visual_loss") or {}), "loss": loss}

                # weights
                if last_of_group:
                    scaler.unscale_(optimizer)
                    gradients = [p.grad for p in raw_model.parameters() if p.grad is not None]
                    losses["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=True)
                progress.update(losses, lr)

            # -------------------------------------------------------------------------------------------------------
            # Log, evaluate, save
            losses = ddp.average(progress.means())
            row = {"epoch": epoch, **{f"train_{name}": value for name, value in losses.items()}, "train_lr": lr}
            if writer:
                write_pictures(writer, "train", batch, output, epoch)
            if test_sets and ((epoch + 1) % args.test_period == 0 or epoch + 1 == args.epochs):
                ddp.share_buffers(raw_model)
                row.update(evaluate_sets(raw_model, test_sets, metric_list, move, writer, epoch, args))
                value = row[f"test_{metric_list[0].name}"]
                if value > best["value"]:
                    best.update(epoch=epoch, value=value, folder=str(output_dir))
            if writer:
                for name, value in row.items():
                    if name != "epoch":
                        writer.add_scalar(name.replace("_", "/", 1), value, epoch)
                writer.flush()
            states = ddp.gather(ddp.random_states())
            if is_main():
                ddp.append_line(output_dir / "log.txt", {**row, "fingerprint": fingerprints})
                ddp.save_checkpoint(output_dir / f"checkpoint-{epoch}.pth", {
                    "model": raw_model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                    "epoch": epoch, "best": best, "rng": states, "args": {**vars(args), **model_args},
                    "fingerprint": fingerprints})
                remove_outdated(output_dir, {epoch - 1, former_best} - {epoch, best["epoch"]}, args.save_period)
            former_best = best["epoch"]

    if best["epoch"] is not None:
        say(f"best {best['metric']}: {best['value']:.4f} at epoch {best['epoch']}, "
            f"in {best['folder']}/checkpoint-{best['epoch']}.pth")
    elif test_sets:
        say(f"no checkpoint is best: {best['metric']} is undefined on these test sets")
    say(f"newest checkpoint: {output_dir / 'checkpoint-'}{args.epochs - 1}.pth")
    ddp.cleanup()


if __name__ == "__main__":
    run(lambda: main(args, model_args))
