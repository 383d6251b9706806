"""The rows that dpvr-mini is pretrained on: MiniBench's questions, captions, and auxiliary tasks (auxiliary_tasks.py).

PretrainingRows[i]   {"images", "messages"}; a row of auxiliary tasks also has "loss_mask", which says of every
                     word of every reply whether it carries loss
"""

import random
from collections.abc import Sequence

from dpvr.pretraining.auxiliary_tasks import Turn, auxiliary_turns
from minibench.data import PAIR_SHARE, MiniBench, Row, to_row
from minibench.questions import CAPTION_REQUESTS, caption
from minibench.scenes import Scene, Split, draw_scene, draw_scene_with_repeats
from minibench.tasks import ONE_PICTURE

# The tasks that take longest to learn come more often.
HARD_TASKS_MORE_OFTEN = (
    "free",
    "existence",
    *["perception"] * 3,
    *["cognition"] * 4,
    *["choice_en"] * 2,
    "choice_cn",
    *["science"] * 2,
    *["scene"] * 2,
)
CHINESE_CAPTIONS = 0.25
TABLES_PER_ROW = 5
TABLES_PER_TEXT_ROW = 3


class PretrainingRows(MiniBench):
    """A map-style data set. With the default shares its rows equal MiniBench's.

    Args:
        split, size, questions_per_row, seed: as `MiniBench`.
        caption_share: the share of rows that ask for a caption in place of questions.
        auxiliary_share: the share of the other rows that are auxiliary tasks in place of questions.
        text_only_share: the share of auxiliary rows without a picture: half have a caption in its place, half are
            about words alone.
        tasks: the tasks that rows of one picture have questions of: tasks of one picture, and "free".
        pair_share: the share of rows with two pictures and multi_image questions.
        repeat_share: the share of rows whose pictures have at least two shapes of one kind or colour, for counting.
    """

    def __init__(
        self,
        split: Split,
        size: int,
        questions_per_row: int = 7,
        seed: int = 0,
        *,
        caption_share: float = 0.0,
        auxiliary_share: float = 0.0,
        text_only_share: float = 0.0,
        tasks: Sequence[str] = ONE_PICTURE,
        pair_share: float = PAIR_SHARE,
        repeat_share: float = 0.0,
    ) -> None:
        super().__init__(split, size, questions_per_row, seed)
        self.caption_share = caption_share
        self.auxiliary_share = auxiliary_share
        self.text_only_share = text_only_share
        self.tasks = tasks
        self.pair_share = pair_share
        self.repeat_share = repeat_share

    def make_row(self, rng: random.Random) -> Row:
        draw = draw_scene_with_repeats if self.repeat_share and rng.random() < self.repeat_share else draw_scene
        scene = draw(self.split, rng)
        if rng.random() < self.caption_share:
            chinese = rng.random() < CHINESE_CAPTIONS
            return to_row((scene,), [(CAPTION_REQUESTS[chinese], caption(scene, chinese))])
        scenes = (scene, draw(self.split, rng)) if rng.random() < self.pair_share else (scene,)
        if rng.random() >= self.auxiliary_share:
            return self.question_row(scenes, self.tasks, rng)
        if rng.random() >= self.text_only_share:
            return auxiliary_row(scenes, auxiliary_turns(scenes, rng, TABLES_PER_ROW))
        if rng.random() < 0.5:
            return auxiliary_row((), auxiliary_turns((), rng, TABLES_PER_TEXT_ROW))
        return captioned_row(scene, auxiliary_turns((scene,), rng, TABLES_PER_TEXT_ROW))


def captioned_row(scene: Scene, turns: list[Turn]) -> Row:
    """A row without a picture that begins with the scene's caption instead."""
    first, *others = turns
    return auxiliary_row((), [first._replace(request=f"{caption(scene)}\n{first.request}"), *others])


def auxiliary_row(scenes: tuple[Scene, ...], turns: list[Turn]) -> Row:
    row = to_row(scenes, [(turn.request, turn.reply) for turn in turns])
    return {**row, "loss_mask": [turn.loss_mask for turn in turns]}
