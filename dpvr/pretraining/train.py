"""Train a small vanilla LLaVA from scratch on MiniBench.

    vision tower    PatchNamer on pictures alone (tower.py)                        in the place of CLIP's training
    LLM             auxiliary tasks in text alone (auxiliary_tasks.py)             in the place of Vicuna's training
    projector       Aligner: patches to the embeddings of their names (tower.py)   in the place of LLaVA's first stage
    projector, LLM  captions, auxiliary tasks, questions, then all again           in the place of LLaVA's second stage

All run in `transformers.Trainer` and keep checkpoints: the same command again goes on where a killed run stopped. The
linear layers run in bfloat16 by autocast and the attention in float32, which is the fast way round on a CPU that has
instructions for bfloat16; on others everything is float32.

    python -m dpvr.pretraining.train --output_dir DIR

writes DIR/final (model and processor), DIR/log.jsonl (a JSON line per start, logging step and validation) and the
checkpoints. The final weights are stored in float16, the config asks for float32 when they are loaded.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset, SequentialSampler
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.trainer_utils import get_last_checkpoint

from dpvr.inference.evaluation import evaluate
from dpvr.pretraining.head_initialisation import initialise_heads
from dpvr.pretraining.optimizer import MuonWithAdamW
from dpvr.pretraining.processor import PATCH, make_processor, save_processor
from dpvr.pretraining.rows import HARD_TASKS_MORE_OFTEN, PretrainingRows
from dpvr.pretraining.tower import ADAMW_LR, MUON_LR, Aligner, PatchCollator, PatchNamer, PatchNames, word_ids
from dpvr.record import run_record
from generation_dpvr import IGNORED_LABEL
from minibench.data import Row
from minibench.scenes import SIDE

# Of the stage "llava": captions alone, then mostly auxiliary tasks, then mostly questions.
CAPTIONS_FIRST, AUXILIARY_NEXT = 0.03, 0.45  # shares of the stage
OTHER_SHARE = 0.3  # of questions among auxiliary tasks, and of auxiliary tasks among questions
CAPTION_SHARE = 0.05  # of captions among both
VISION_NAME = re.compile(r"vision_tower\.(?!vision_model\.)")
# Rows are padded to multiples of LENGTH_STEP, so that compiled layers meet few lengths, and cut at MAX_LENGTH: a
# quarter of the rows lose their last turns, the batches a fifth of their padding.
LENGTH_STEP = 136
MAX_LENGTH = 2 * LENGTH_STEP


def attention_in_float32(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """SDPA outside autocast: on a CPU its backward is several times faster in float32 than in bfloat16."""
    with torch.autocast(query.device.type, enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)


AttentionInterface.register("sdpa_float32", attention_in_float32)
AttentionMaskInterface.register("sdpa_float32", sdpa_mask)


def make_model(processor: LlavaProcessor, args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """Return a LLaVA to be trained: CLIP ViT read at its last layer but one, GELU projector, Llama decoder.

    All weights are random but for three heads, see `initialise_heads`."""
    tokenizer = processor.tokenizer
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=args.vision_width,
        intermediate_size=3 * args.vision_width,
        num_hidden_layers=args.vision_layers,
        num_attention_heads=args.vision_width // 32,
        projection_dim=args.vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.text_width,
        intermediate_size=5 * args.text_width // 4,
        num_hidden_layers=args.text_layers,
        num_attention_heads=args.text_width // 64,
        num_key_value_heads=args.text_width // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )
    config._attn_implementation = "sdpa_float32"
    model = LlavaForConditionalGeneration(config)
    initialise_heads(model.model.language_model)
    return model


class RowCollator:
    """Turns rows of MiniBench into LLaVA's inputs, padded or cut on the right.

    The replies alone carry loss, and of an auxiliary task's replies the words that its mask names, with what ends
    them."""

    def __init__(self, processor: LlavaProcessor, max_length: int = MAX_LENGTH) -> None:
        self.processor = processor
        self.max_length = max_length
        tokenizer = processor.tokenizer
        self.tokenizer = tokenizer
        self.opening = tokenizer.encode(" ASSISTANT:", add_special_tokens=False)
        self.eos = tokenizer.eos_token_id

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        texts = self.processor.apply_chat_template([row["messages"] for row in rows])
        images = [picture for row in rows for picture in row["images"]] or None
        padding = {"padding": True, "padding_side": "right", "pad_to_multiple_of": LENGTH_STEP}
        batch = self.processor(text=texts, images=images, return_tensors="pt", **padding)
        ids = batch["input_ids"][:, : self.max_length]  # a row begins with its pictures
        labels = ids.masked_fill(~self.replies(ids), IGNORED_LABEL)
        for row, row_labels in zip(rows, labels, strict=True):
            if "loss_mask" in row:
                carried = torch.tensor(self.carried(row), dtype=torch.bool)
                (replies,) = (row_labels != IGNORED_LABEL).nonzero(as_tuple=True)
                row_labels[replies[~carried[: len(replies)]]] = IGNORED_LABEL
        # A causal model never reads padding on the right: without a mask, attention keeps its fast kernel.
        return {"input_ids": ids, "labels": labels, **({"pixel_values": batch["pixel_values"]} if images else {})}

    def carried(self, row: Row) -> list[bool]:
        """Return for every token of an auxiliary task's replies and their ends whether it carries loss."""
        replies = [message["content"][0]["text"] for message in row["messages"] if message["role"] == "assistant"]
        flags: list[bool] = []
        for reply, mask in zip(replies, row["loss_mask"], strict=True):
            for word, in_loss in zip(reply.split(), mask, strict=True):
                flags += [in_loss] * len(self.tokenizer.encode(f" {word}", add_special_tokens=False))
            flags.append(True)  # the end token
        return flags

    def replies(self, ids: torch.Tensor) -> torch.Tensor:
        """Return `bool[B, T]`, true from after "ASSISTANT:" to the end token: the template's generation blocks."""
        first, second = self.opening
        starts = torch.zeros_like(ids, dtype=torch.bool)
        starts[:, 2:] = (ids[:, :-2] == first) & (ids[:, 1:-1] == second)
        ends = torch.zeros_like(starts)
        ends[:, 1:] = ids[:, :-1] == self.eos
        return starts.cumsum(1) > ends.cumsum(1)


class InOrderTrainer(Trainer):
    """A Trainer that takes the rows by index: the data sets are random already, and captions are to come first."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


class LlavaTrainer(InOrderTrainer):
    """A Trainer that can go on: it reads a checkpoint by `from_pretrained`, which knows the names it was saved under.

    LLaVA's parameters are saved under other names than they have in memory, and Trainer's own way of reading leaves
    them as they were, with no more than a warning.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load_state_dict(type(self.model).from_pretrained(resume_from_checkpoint).state_dict())


class JsonLog(TrainerCallback):
    """Appends what the Trainer logs to a file of JSON lines, each with the stage, the step and the seconds so far."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage
        self.start = time.time()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: Any
    ) -> None:
        self.write(step=state.global_step, **logs)

    def write(self, **entry: Any) -> None:
        entry = {"stage": self.stage, "seconds": round(time.time() - self.start, 1), **entry}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class Validation(TrainerCallback):
    """Measures accuracy on the validation split every `every` steps."""

    def __init__(self, log: JsonLog, processor: LlavaProcessor, every: int, num_questions: int) -> None:
        self.log = log
        self.processor = processor
        self.every = every
        self.num_questions = num_questions

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            with torch.compiler.set_stance("force_eager"):
                result = evaluate(model, self.processor, split="validation", num_questions=self.num_questions)
            scores = {task: round(score, 4) for task, score in result["tasks"].items()}
            self.log.write(step=state.global_step, validation=scores, mean=round(result["mean"], 4))


def computes_bfloat16() -> bool:
    """Whether bfloat16 is the fast way here; a CPU without the instructions emulates it, hundreds of times slower."""
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
        lr_scheduler_kwargs={"num_decay_steps": int(args.decay_share * steps)},
        warmup_steps=min(args.warmup_steps, steps // 10),
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


def run(trainer: Trainer) -> None:
    """Train, from the last checkpoint if there is one."""
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)


def train_tower(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Teach the vision tower to name what covers each patch."""
    namer = PatchNamer(model.model.vision_tower, model.config.vision_feature_layer)
    trainer = InOrderTrainer(
        model=namer,
        args=training_arguments(args, "tower", args.tower_pictures),
        train_dataset=PatchNames("train", args.tower_pictures, seed=args.seed + 1),
        data_collator=PatchCollator(processor.image_processor, PATCH),
        optimizers=(MuonWithAdamW(namer, MUON_LR, ADAMW_LR), None),
        callbacks=[JsonLog(args.output_dir / "log.jsonl", "tower")],
    )
    run(trainer)


def train_language(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Train the decoder to look back in a text: auxiliary tasks about words and about captions."""
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    trainer = LlavaTrainer(
        model=model,
        args=training_arguments(args, "language", args.texts),
        train_dataset=PretrainingRows(
            "train", args.texts, seed=args.seed + 5, auxiliary_share=1.0, text_only_share=1.0
        ),
        data_collator=RowCollator(processor, LENGTH_STEP),
        optimizers=(MuonWithAdamW(model, args.muon_lr / 2, args.adamw_lr / 2), None),  # at full rates it learns less
        callbacks=[JsonLog(args.output_dir / "log.jsonl", "language")],
    )
    run(trainer)
    model.model.multi_modal_projector.requires_grad_(True)


def align_projector(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Teach the projector to speak the decoder's words."""
    aligner = Aligner(model.model, word_ids(processor.tokenizer))
    trainer = InOrderTrainer(
        model=aligner,
        args=training_arguments(args, "projector", args.aligned_pictures),
        train_dataset=PatchNames("train", args.aligned_pictures, seed=args.seed + 6),
        data_collator=PatchCollator(processor.image_processor, PATCH),
        optimizers=(MuonWithAdamW(aligner, MUON_LR, ADAMW_LR), None),
        callbacks=[JsonLog(args.output_dir / "log.jsonl", "projector")],
    )
    run(trainer)
    model.requires_grad_(True)


def mixed_rows(size: int, seed: int, auxiliary_share: float, args: argparse.Namespace) -> PretrainingRows:
    """Return auxiliary tasks in their share, questions of all tasks and some captions; hard tasks more often."""
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
    """Train decoder and projector. The tower stays as it is, as CLIP does in LLaVA."""
    model.model.vision_tower.requires_grad_(False)
    log = JsonLog(args.output_dir / "log.jsonl", stage)
    trainer = LlavaTrainer(
        model=model,
        args=training_arguments(args, stage, sum(map(len, rows))),
        train_dataset=ConcatDataset(rows),
        data_collator=RowCollator(processor),
        optimizers=(MuonWithAdamW(model, args.muon_lr, args.adamw_lr), None),
        callbacks=[log, Validation(log, processor, args.validation_steps, args.validation_questions)],
    )
    run(trainer)


def train_llava(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Train on captions, then mostly on auxiliary tasks, then mostly on questions."""
    num_captions, num_auxiliary = (int(share * args.pictures) for share in (CAPTIONS_FIRST, AUXILIARY_NEXT))
    captions = PretrainingRows("train", num_captions, seed=args.seed + 2, caption_share=1.0)
    auxiliary = mixed_rows(num_auxiliary, args.seed + 4, 1 - OTHER_SHARE, args)
    questions = mixed_rows(args.pictures - num_captions - num_auxiliary, args.seed + 3, OTHER_SHARE, args)
    train_decoder("llava", [captions, auxiliary, questions], model, processor, args)


def train_further(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Train on as many auxiliary tasks as questions, the rates rising and falling once more."""
    rows = mixed_rows(args.further_pictures, args.seed + 7, 0.5, args)
    train_decoder("further", [rows], model, processor, args)


STAGES = {
    "tower": train_tower,
    "language": train_language,
    "projector": align_projector,
    "llava": train_llava,
    "further": train_further,
}


def train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Run the stages one after the other; one that is done is read from the file it left."""
    model.config.text_config.use_cache = False  # Trainer turns off the outer one; a cache has every layer recompiled
    if args.compile:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=False)
    for name, stage in STAGES.items():
        done = args.output_dir / f"{name}.safetensors"
        if done.exists():
            print(f"The stage {name!r} is done: its weights are read from {done}. To run it again, delete that file.")
            model.load_state_dict(load_file(done))
            continue
        stage(model, processor, args)
        torn = done.with_suffix(".tmp")
        save_file({key: weight.contiguous() for key, weight in model.state_dict().items()}, torn)
        torn.replace(done)
    model.config.text_config.use_cache = True


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Save float16 weights under a config that asks for float32: half the file, the arithmetic of the training.

    The tower is named as in LLaVA's published checkpoints, which transformers 4.57 and 5 both read; version 5 itself
    writes the tower without `vision_model`, and version 4 would then start it at random.
    """
    model.to(torch.float16).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {VISION_NAME.sub(r"vision_tower.vision_model.", name): weight for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("use_cache", None)  # Trainer turns it off
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_processor(processor, folder)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small vanilla LLaVA from scratch on MiniBench.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--text_layers", type=int, default=12)
    parser.add_argument("--text_width", type=int, default=192)
    parser.add_argument("--vision_layers", type=int, default=6)
    parser.add_argument("--vision_width", type=int, default=192)
    parser.add_argument("--tower_pictures", type=int, default=60_000)
    parser.add_argument("--texts", type=int, default=9_600)
    parser.add_argument("--aligned_pictures", type=int, default=12_000)
    parser.add_argument("--pictures", type=int, default=82_000)
    parser.add_argument("--further_pictures", type=int, default=64_000)
    parser.add_argument("--questions_per_row", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--adamw_lr", type=float, default=2e-3)
    parser.add_argument("--warmup_steps", type=int, default=50)
    parser.add_argument("--decay_share", type=float, default=0.4, help="share of the run in which lr falls to 0")
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--logging_steps", type=int, default=20)
    parser.add_argument("--save_steps", type=int, default=100)
    parser.add_argument("--validation_steps", type=int, default=250)
    parser.add_argument("--validation_questions", type=int, default=40, help="of each task")
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    JsonLog(args.output_dir / "log.jsonl", "start").write(**run_record("-m dpvr.pretraining.train"))
    torch.manual_seed(args.seed)
    processor = make_processor()
    model = make_model(processor, args)
    print(f"{model.num_parameters():,} parameters")
    train(model, processor, args)
    save(model, processor, args.output_dir / "final")


if __name__ == "__main__":
    main(parse_args())
