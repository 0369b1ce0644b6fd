from __future__ import annotations

import numpy as np

from bascule.config.training import GrpoConfig
from bascule.train.curriculum import Curriculum, open_share
from bascule.train.objective import choose


def test_by_default_the_prompts_are_the_shuffled_stream_and_nothing_else():
    curriculum = Curriculum(GrpoConfig(), 50, seed=3)
    assert [curriculum.take(8, 0.0), curriculum.take(8, 0.9)] == [
        choose(3, "grpo.prompts", start, 8, 50) for start in (0, 8)
    ]


def test_easy_first_begins_with_the_easiest_quarter_and_ends_with_all():
    hard_last = list(range(40))
    curriculum = Curriculum(GrpoConfig(curriculum="easy_first"), 40, 0, hard_last)
    assert sorted(curriculum.take(10, 0.0)) == list(range(10))
    assert max(curriculum.take(40, 0.5)) > 30
    assert (open_share(0.0), open_share(0.25), open_share(1.0)) == (0.25, 0.625, 1.0)


def test_a_prompt_solved_twice_running_is_asked_no_more_and_a_failure_starts_the_count_again():
    curriculum = Curriculum(GrpoConfig(retire_after=2), 3, 0)
    curriculum.learn([0, 1], np.array([[1.0, 1.0], [1.0, 1.0]]))
    curriculum.learn([0, 1], np.array([[1.0, 1.0], [1.0, 0.0]]))
    curriculum.learn([1], np.array([[1.0, 1.0]]))
    assert curriculum.retired == {0}
    assert 0 not in curriculum.take(12, 0.0)
    curriculum.learn([1, 2, 2], np.ones((3, 2)))
    assert curriculum.retired == {0, 1, 2}
    assert set(curriculum.take(3, 0.0)) == {0, 1, 2}  # nothing else is left to ask


def test_its_state_continues_the_same_stream():
    first = Curriculum(GrpoConfig(retire_after=1), 9, 1)
    first.learn(first.take(3, 0.0), np.ones((3, 2)))
    second = Curriculum(GrpoConfig(retire_after=1), 9, 1)
    second.load_state_dict(first.state_dict())
    assert second.take(5, 0.3) == first.take(5, 0.3) and second.retired == first.retired
