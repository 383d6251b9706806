"""The stages of pretraining, one after the other; a killed run resumes at its last checkpoint.

    tower       PatchNamer on pictures alone (tower.py)                         in place of CLIP's training
    language    the decoder on auxiliary tasks without pictures                 in place of Vicuna's training
    projector   Aligner: patches to the embeddings of their names (tower.py)    in place of LLaVA's first stage
    llava       projector and decoder: captions, then mostly auxiliary tasks,   in place of LLaVA's second stage
                then mostly questions
    further     the same on as many auxiliary tasks as questions

Each stage leaves its weights in DIR/<stage>.safetensors.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from dpvr.pretraining.collator import LENGTH_STEP, RowCollator
from dpvr.pretraining.model import make_model
from dpvr.pretraining.optimizer import ADAMW_LR, MUON_LR, MuonWithAdamW
from dpvr.pretraining.processor import PATCH, make_processor
from dpvr.pretraining.rows import HARD_TASKS_MORE_OFTEN, PretrainingRows
from dpvr.pretraining.saving import save
from dpvr.pretraining.tower import Aligner, PatchCollator, PatchNamer, PatchNames, word_ids
from dpvr.pretraining.trainers import InOrderTrainer, JsonLog, LlavaTrainer, Validation, validation_table
from dpvr.record import run_record

WARMUP_STEPS = 50  # at most; a tenth of a short stage
DECAY_SHARE = 0.4  # of a stage's steps, in which the learning rate falls to 0
# Of the stage "llava": captions alone, then mostly auxiliary tasks, then mostly questions.
CAPTIONS_FIRST, AUXILIARY_NEXT = 0.03, 0.45  # shares of the stage
OTHER_SHARE = 0.3  # of questions among auxiliary tasks, and of auxiliary tasks among questions
CAPTION_SHARE = 0.05  # of captions among both


def pretrain(args: argparse.Namespace) -> None:
    """Train a small LLaVA through all stages, save it to DIR/final, and say how well it does."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = args.output_dir / "log.jsonl"
    JsonLog(log, "start").write(**run_record("-m dpvr.pretraining.train"))
    torch.manual_seed(args.seed)
    processor = make_processor()
    model = make_model(processor, args)
    print(f"{model.num_parameters():,} parameters")
    run_stages(model, processor, args)
    save(model, processor, args.output_dir / "final")
    print(f"Written to {args.output_dir / 'final'}. Accuracy on validation questions, the last time it was measured:")
    print(validation_table(log))


def computes_bfloat16() -> bool:
    """Whether the hardware computes in bfloat16; a CPU without it emulates it, hundreds of times slower."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def training_arguments(args: argparse.Namespace, stage: str, num_rows: int) -> TrainingArguments:
    steps = num_rows // args.batch_size
    return TrainingArguments(
        output_dir=str(args.output_dir / stage),
        per_device_train_batch_size=args.batch_size,
        num_train_epochs=1,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(DECAY_SHARE * steps)},
        warmup_steps=min(WARMUP_STEPS, steps // 10),
        bf16=computes_bfloat16(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=args.num_workers,
        dataloader_drop_last=True,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_total_limit=2,
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        seed=args.seed,
    )


def run_stage(trainer: Trainer) -> None:
    """Train, from the last checkpoint if there is one."""
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)


def train_tower(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Train the vision tower to name the object that covers each patch."""
    namer = PatchNamer(model.model.vision_tower, model.config.vision_feature_layer)
    trainer = InOrderTrainer(
        model=namer,
        args=training_arguments(args, "tower", args.tower_pictures),
        train_dataset=PatchNames("train", args.tower_pictures, seed=args.seed + 1),
        data_collator=PatchCollator(processor.image_processor, PATCH),
        optimizers=(MuonWithAdamW(namer, MUON_LR, ADAMW_LR), None),
        callbacks=[JsonLog(args.output_dir / "log.jsonl", "tower")],
    )
    run_stage(trainer)


def train_language(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Train the decoder on text: auxiliary tasks about words and about captions."""
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    trainer = LlavaTrainer(
        model=model,
        args=training_arguments(args, "language", args.texts),
        train_dataset=PretrainingRows(
            "train", args.texts, seed=args.seed + 5, auxiliary_share=1.0, text_only_share=1.0
        ),
        data_collator=RowCollator(processor, LENGTH_STEP),
        optimizers=(MuonWithAdamW(model, MUON_LR / 2, ADAMW_LR / 2), None),  # the loss is higher at full rates
        callbacks=[JsonLog(args.output_dir / "log.jsonl", "language")],
    )
    run_stage(trainer)
    model.model.multi_modal_projector.requires_grad_(True)


def align_projector(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Train the projector to map each patch to the embeddings of its names."""
    aligner = Aligner(model.model, word_ids(processor.tokenizer))
    trainer = InOrderTrainer(
        model=aligner,
        args=training_arguments(args, "projector", args.aligned_pictures),
        train_dataset=PatchNames("train", args.aligned_pictures, seed=args.seed + 6),
        data_collator=PatchCollator(processor.image_processor, PATCH),
        optimizers=(MuonWithAdamW(aligner, MUON_LR, ADAMW_LR), None),
        callbacks=[JsonLog(args.output_dir / "log.jsonl", "projector")],
    )
    run_stage(trainer)
    model.requires_grad_(True)


def mixed_rows(size: int, seed: int, auxiliary_share: float, args: argparse.Namespace) -> PretrainingRows:
    """Return rows of auxiliary tasks, questions and some captions; hard tasks come more often."""
    return PretrainingRows(
        "train",
        size,
        args.questions_per_row,
        seed,
        tasks=HARD_TASKS_MORE_OFTEN,
        caption_share=CAPTION_SHARE,
        auxiliary_share=auxiliary_share,
        pair_share=0.25,
        repeat_share=0.6,
    )


def train_decoder(
    stage: str,
    rows: list[PretrainingRows],
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    args: argparse.Namespace,
) -> None:
    """Train decoder and projector; the vision tower is frozen, as CLIP is in LLaVA."""
    model.model.vision_tower.requires_grad_(False)
    log = JsonLog(args.output_dir / "log.jsonl", stage)
    trainer = LlavaTrainer(
        model=model,
        args=training_arguments(args, stage, sum(map(len, rows))),
        train_dataset=ConcatDataset(rows),
        data_collator=RowCollator(processor),
        optimizers=(MuonWithAdamW(model, MUON_LR, ADAMW_LR), None),
        callbacks=[log, Validation(log, processor, args.validation_steps, args.validation_questions)],
    )
    run_stage(trainer)


def train_llava(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Train on captions, then mostly on auxiliary tasks, then mostly on questions."""
    num_captions, num_auxiliary = (int(share * args.pictures) for share in (CAPTIONS_FIRST, AUXILIARY_NEXT))
    captions = PretrainingRows("train", num_captions, seed=args.seed + 2, caption_share=1.0)
    auxiliary = mixed_rows(num_auxiliary, args.seed + 4, 1 - OTHER_SHARE, args)
    questions = mixed_rows(args.pictures - num_captions - num_auxiliary, args.seed + 3, OTHER_SHARE, args)
    train_decoder("llava", [captions, auxiliary, questions], model, processor, args)


def train_further(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Train on as many auxiliary tasks as questions, with a second learning rate schedule."""
    rows = mixed_rows(args.further_pictures, args.seed + 7, 0.5, args)
    train_decoder("further", [rows], model, processor, args)


STAGES = {
    "tower": train_tower,
    "language": train_language,
    "projector": align_projector,
    "llava": train_llava,
    "further": train_further,
}


def run_stages(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Run the stages one after the other; a finished stage is loaded from the file that it saved."""
    model.config.text_config.use_cache = False  # Trainer sets the outer one; with a cache every layer is recompiled
    if args.compile:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=False)
    for name, stage in STAGES.items():
        done = args.output_dir / f"{name}.safetensors"
        if done.exists():
            print(f"The stage {name!r} is done, and its weights are loaded from {done}: delete it to run it again.")
            model.load_state_dict(load_file(done))
            continue
        stage(model, processor, args)
        unfinished = done.with_suffix(".tmp")
        save_file({key: weight.contiguous() for key, weight in model.state_dict().items()}, unfinished)
        unfinished.replace(done)
    model.config.text_config.use_cache = True
