"""What an edit should leave of the picture's light, by attribute."""

import torch

from shared.attributes import ATTRIBUTES, MAX_DEGREE, Attribute
from training.fields import FOREHEAD, HAIR_COLUMNS, HAIR_ROW, wanted_light


def head(hair: float, skin: float) -> torch.Tensor:
    """Coarse colours [1,3,8,8]: hair above and at the sides, skin between."""
    light = torch.full((1, 3, 8, 8), hair)
    light[:, :, 1:, 2:6] = skin
    return light


def test_a_fringe_brings_the_hairs_own_colour_down_the_forehead() -> None:
    bangs = torch.tensor([Attribute.BANGS.index])
    for hair in (-0.9, 0.6):  # black, blond
        before = head(hair, skin=0.2)
        wanted = wanted_light(before, bangs, torch.tensor([MAX_DEGREE]))
        for row, share in FOREHEAD.items():
            drawn = wanted[:, :, row, HAIR_COLUMNS]
            torch.testing.assert_close(drawn, torch.full_like(drawn, 0.2 + share * (hair - 0.2)))
        rows = [row for row in range(8) if row not in FOREHEAD]
        torch.testing.assert_close(wanted[:, :, rows], before[:, :, rows])
        half = wanted_light(before, bangs, torch.tensor([2]))
        covered = (half - before).norm() / (wanted - before).norm()
        torch.testing.assert_close(covered, torch.tensor(2 / MAX_DEGREE))
        back = wanted_light(before, bangs, torch.tensor([-2]))
        torch.testing.assert_close(back - before, before - half)


def test_all_other_edits_keep_the_light() -> None:
    rows = torch.tensor([one.index for one in ATTRIBUTES if one is not Attribute.BANGS])
    before = torch.rand(len(rows), 3, 8, 8)
    wanted = wanted_light(before, rows, torch.tensor([3, -3, 2, 1]))
    torch.testing.assert_close(wanted, before)
    assert HAIR_ROW not in FOREHEAD  # what the colour is taken from stays as it was
