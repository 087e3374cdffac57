"""SubspaceTrainer: transformers' Trainer that finds the rate of theta_d, and takes optimisers that need a closure."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from .evaluation import run
from .optim import PPlusBFGS
from .optim.closure import Update
from .rates import IS_FOUND, find_rates, is_like_adam, parameter_groups, set_rate
from .sensitivity import is_theta_d


def needs_closure(optimizer: Callable) -> bool:
    """Whether the step of this optimiser class needs a closure: it has `needs_closure = True`, or is torch's LBFGS."""
    is_lbfgs = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.LBFGS)
    return is_lbfgs or getattr(optimizer, "needs_closure", False)


def innermost(optimizer: Any) -> Any:
    """The optimiser inside those of accelerate and DeepSpeed."""
    kinds = ("accelerate.", "deepspeed.")
    while type(optimizer).__module__.startswith(kinds) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def is_left_out(arguments: TrainingArguments) -> bool:
    """Whether the learning rate is a default of transformers or TRL."""
    kinds = (kind for kind in type(arguments).__mro__ if kind.__module__.startswith(("transformers.", "trl.")))
    return arguments.learning_rate in {vars(kind).get("learning_rate") for kind in kinds}


def of_trl(trainer: Trainer, method: str) -> bool:
    """Whether a class of TRL has this method of a trainer."""
    kinds = type(trainer).__mro__
    return any(method in vars(kind) for kind in kinds if kind.__module__.startswith("trl."))


class NoOutputsError(Exception):
    """A loss that does not return the outputs it was computed from."""


class SubspaceTrainer(Trainer):
    """transformers.Trainer that finds the rates of theta_d and a head, and takes optimisers that need a closure.

    Where `learning_rate` is left at a default of transformers or TRL and the optimiser to Trainer, the rates are those
    of `parameter_groups(model, batch=..., steps=...)` for the first batch and all steps, fall by the schedule of the
    arguments, and are logged. With a learning rate or an optimiser it trains as Trainer does, bit for bit. In front of
    a subclass of Trainer it does the same there: `class Tuner(SubspaceTrainer, SFTTrainer): pass`.

    Pass an optimiser that needs a closure as `optimizers=(PBFGS([theta_d]), None)`, or as
    `optimizer_cls_and_kwargs=(PBFGS, {})`, which gives it all trainable parameters in one group. An update needs no
    more evaluations than a plain loop. All evaluations of an update see the same dropout, and only the first changes
    batch-norm statistics.

    With a closure gradients are not clipped: the difference of two clipped gradients is not the curvature.

    Raises:
        ValueError: before training, if the optimiser needs a closure, for: fp16, DeepSpeed, FSDP; a `max_grad_norm`
            that is neither 0 nor the default; `weight_decay` with `optimizer_cls_and_kwargs`; gradient accumulation if
            the optimiser needs logits; checkpoints with PPlusBFGS, which trains weights that an adapter's file does
            not hold.
    """

    _subspace_update: Update | None = None
    _undo_closures: Callable[[], None] | None = None
    _needs_logits = False
    _is_rate_due = False  # whether the first step finds rates

    def train(self, *args, **kwargs):
        self._end_closures()
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end_closures()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            optimizer, settings = self.optimizer_cls_and_kwargs
            if needs_closure(optimizer):
                if self.args.weight_decay:
                    raise ValueError(
                        f"`weight_decay` must be 0 with {optimizer.__name__}, got {self.args.weight_decay}; add the "
                        "penalty to the loss instead, so that a line search sees it."
                    )
                parameters = (self.model if model is None else model).parameters()
                self.optimizer = optimizer([p for p in parameters if p.requires_grad], **settings)
        is_left = self.optimizer is None or type(self.optimizer).__name__ == "DummyOptim"  # that of DeepSpeed
        if is_left and self.optimizer_cls_and_kwargs is None and is_left_out(self.args):
            self._group_by_rate(self.model if model is None else model)
        super().create_optimizer(model)
        optimizer = innermost(self.optimizer)  # accelerate's is around it from an earlier call of `train`
        if needs_closure(type(optimizer)) and self._undo_closures is None:
            self._check_closure(optimizer)
            self._begin_closures(optimizer)
        return self.optimizer

    # ------------------------------------------------------------------------------------- the rates that are left out

    def _group_by_rate(self, model: nn.Module) -> None:
        """Give theta_d and the head groups of their own, whose rates the first step corrects."""
        if not any(p.requires_grad and is_theta_d(name) for name, p in model.named_parameters()):
            return
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
        if why := self._rate_obstacle(kind):
            self._warn_of_default(why)
            return
        lr = settings.pop("lr")
        theta_d, *head = parameter_groups(model, lr, head_lr=lr)
        theta_d[IS_FOUND] = True
        if self.args.weight_decay:
            head = [part for group in head for part in self._decaying_parts(model, group)]
        # lr=1.0 is for schedules with an absolute end, which compare it with that; the groups have their own
        self.optimizer, self._is_rate_due = kind([theta_d, *head], lr=1.0, **settings), True

    def _rate_obstacle(self, kind: type) -> str:
        """Why no rate is found, or nothing."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        config = plugin.deepspeed_config if self.is_deepspeed_enabled else {}
        own = next((name for name in ("optimizer", "scheduler") if name in config), None)
        if own:
            return f"where DeepSpeed's configuration has an `{own}`"
        if of_trl(self, "_prepare_inputs"):
            return f"for {type(self).__name__}, which generates what it trains on"
        return "" if is_like_adam(kind) else f"for {kind.__name__}"

    def _warn_of_default(self, why: str) -> None:
        default = f"theta_d trains at Trainer's default of {self.args.learning_rate}, too low for most models"
        warnings.warn(f"No rate is found {why}: {default}; set `learning_rate`.", stacklevel=3)

    def _decaying_parts(self, model: nn.Module, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The group in two, as Trainer makes them: biases and norms do not decay."""
        names = set(self.get_decay_parameter_names(model))
        decaying = {p for name, p in model.named_parameters() if name in names}
        for weight_decay in (self.args.weight_decay, 0.0):
            if part := [p for p in group["params"] if (p in decaying) == bool(weight_decay)]:
                yield group | {"params": part, "weight_decay": weight_decay}

    def _find_rates(self, inputs: Any, num_items: Tensor | int | None) -> None:
        """Begin the schedule from the rates that are due, or from those of the checkpoint that was loaded."""
        groups = self.optimizer.param_groups
        if not groups[0].get(IS_FOUND):  # of another optimiser
            return
        if self.optimizer.state and self.state.global_step:
            self._begin_schedule([float(group.get("initial_lr", group["lr"])) for group in groups], is_resumed=True)
            return
        try:
            with self.compute_loss_context_manager():
                forward = partial(self._outputs_of_loss, num_items=num_items)
                theta_d, head = find_rates(self.model, self._prepare_inputs(inputs), self.state.max_steps, forward)
        except NoOutputsError as error:
            del groups[0][IS_FOUND]
            self._begin_schedule([self.args.learning_rate] * len(groups), is_resumed=False)
            reason = f" ({error})" if str(error) else ""
            self._warn_of_default(f"for {type(self).__name__}, whose loss gives no outputs{reason}")
            return
        self._begin_schedule([theta_d, *[head] * (len(groups) - 1)], is_resumed=False)
        of_head = {"found_head_learning_rate": head} if len(groups) > 1 else {}
        self.log({"found_learning_rate": theta_d} | of_head)

    def _begin_schedule(self, rates: list[float], is_resumed: bool) -> None:
        """Let the schedule begin from these rates: where it is, callbacks may hold it."""
        groups, held = self.optimizer.param_groups, self.lr_scheduler
        now = [float(group["lr"]) for group in groups]
        state = held.state_dict() if is_resumed else None
        for group, rate in zip(groups, rates, strict=True):
            set_rate(group, rate)
            group.pop("initial_lr", None)
        innermost(self.optimizer).defaults["lr"] = rates[0]  # where schedules with an absolute end read it
        self.lr_scheduler = None
        begun = self.create_scheduler(self.state.max_steps, self.optimizer)
        if state is not None:
            begun.load_state_dict(state)
            for group, lr in zip(groups, now, strict=True):
                set_rate(group, lr)
        held.__dict__.update(begun.__dict__)
        self.lr_scheduler = held

    def _outputs_of_loss(self, model: nn.Module, inputs: Any, num_items: Tensor | int | None) -> Any:
        """As the loss sees them, which may be the user's own; it may change the mapping that it is given.

        The losses of TRL make outputs anew, or none, and count these runs as evaluations: there the model alone runs.
        """
        if of_trl(self, "compute_loss"):
            alone = self._inputs_of_forward(model, inputs)
            if not alone:
                raise NoOutputsError("a batch is no input of the model")
            return run(model, alone)
        given = dict(inputs) if isinstance(inputs, Mapping) else inputs
        try:
            found = self.compute_loss(model, given, return_outputs=True, num_items_in_batch=num_items)
        except NotImplementedError as error:
            raise NoOutputsError(str(error)) from error
        return found[1] if isinstance(found, tuple) else run(model, inputs)

    def _inputs_of_forward(self, model: nn.Module, inputs: Any) -> dict[str, Any]:
        """Those of the inputs that the model's forward takes, or none if its main one is not among them."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        taken = inspect.signature(base.forward).parameters
        found = {name: value for name, value in inputs.items() if name in taken} if isinstance(inputs, Mapping) else {}
        return found if getattr(base, "main_input_name", None) in found else {}

    # ------------------------------------------------------------------------------------------------------- closures

    def _check_closure(self, optimizer: torch.optim.Optimizer) -> None:
        name, args = type(optimizer).__name__, self.args
        if self.accelerator.mixed_precision == "fp16":
            raise ValueError(
                f"`fp16` must be off with {name}: the gradient scaler would scale its gradients but not its loss; use "
                "`bf16=True`, or full precision."
            )
        for kind, on in {"DeepSpeed": self.is_deepspeed_enabled, "FSDP": self.is_fsdp_enabled}.items():
            if on:
                raise ValueError(
                    f"{name} must hold its parameters whole, and {kind} shards them; use plain data parallelism, "
                    "which reduces only d numbers a step."
                )
        if args.max_grad_norm not in (0, type(args).max_grad_norm):
            raise ValueError(
                f"`max_grad_norm` must be 0 with {name}, got {args.max_grad_norm}: differences of clipped gradients "
                "are not the curvature; bound the step by the settings of the optimiser."
            )
        if getattr(optimizer, "needs_logits", False) and args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"`gradient_accumulation_steps` must be 1 with {name}, got {args.gradient_accumulation_steps}: it "
                "needs the logits of the whole batch at once; raise `per_device_train_batch_size`."
            )
        if isinstance(optimizer, PPlusBFGS) and args.save_strategy != "no":
            raise ValueError(
                f"`save_strategy` must be 'no' with {name}, got {args.save_strategy.value!r}: it trains the base too, "
                "which the checkpoint of an adapter leaves out; save `model.merge_and_unload()` after training."
            )

    def _begin_closures(self, optimizer: torch.optim.Optimizer) -> None:
        clipping, self.args.max_grad_norm = self.args.max_grad_norm, 0.0

        def give_closure(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            self._subspace_update.keep_gradients()
            return (optimizer, self._subspace_update), {}

        handle = optimizer.register_step_pre_hook(give_closure)

        def undo() -> None:
            self.args.max_grad_norm = clipping
            handle.remove()

        self._undo_closures = undo
        self._needs_logits = getattr(optimizer, "needs_logits", False)

    def _end_closures(self) -> None:
        if self._undo_closures is not None:
            self._undo_closures()
        self._undo_closures = self._subspace_update = None

    def get_batch_samples(self, *args, **kwargs):
        if self._undo_closures is not None:
            self._subspace_update = Update(self.accelerator)
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if self._is_rate_due:
            self._find_rates(inputs, num_items_in_batch)
            self._is_rate_due = False  # not before, as it may fail
        if self._undo_closures is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._needs_logits:
            loss, _, _ = self._subspace_update.add(
                model, partial(self._loss_logits_and_labels, model, inputs, num_items_in_batch)
            )
            return loss.detach()
        return self._subspace_update.add(model, partial(super().training_step, model, inputs, num_items_in_batch))

    def _loss_logits_and_labels(
        self, model: nn.Module, inputs: dict, num_items: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, logits (in a tuple after the loss) and labels, from whose graph the gradients are computed."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(
                f"A batch must have `labels` for class gradients, got {sorted(inputs)}; name the labels so."
            )
        # no_sync, because no backward follows for which DDP should prepare
        with self.accelerator.no_sync(model), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items)
        return loss, outputs["logits"] if isinstance(outputs, dict) else outputs[outputs[0].ndim == 0], labels
