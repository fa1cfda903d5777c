"""Expected calibration error, and the search for a temperature or smoothing."""

import numpy as np
import pytest

from distill_jax.eval.calibration import WAYS, expected_calibration_error, search, smooth, temper

CARD = np.log(np.array([[0.6, 0.2, 0.1, 0.05, 0.03]]))


def test_hand_values_of_the_card():
    np.testing.assert_allclose(np.exp(temper(CARD, 1.0)), [[.612245, .204082, .102041, .051020, .030612]], atol=1e-6)
    np.testing.assert_allclose(np.exp(temper(CARD, 2.0)), [[.400339, .231136, .163438, .115568, .089519]], atol=1e-6)
    np.testing.assert_allclose(np.exp(smooth(CARD, 0.1)), [[.512245, .229082, .127041, .076020, .055612]], atol=1e-6)
    np.testing.assert_allclose(smooth(CARD, 0.0), temper(CARD, 1.0), atol=1e-12)


def test_smoothing_never_moves_the_first_below_the_others_and_leaves_absent_ones_out():
    out = np.exp(smooth(np.log(np.array([[0.3, 0.25, 0.2, 0.1], [0.9, 0.1, 0.0, 0.0]]) + 1e-300), 0.5))
    assert out[0, 0] >= out[0].max() - 0.1 and np.isclose(out.sum(-1), 1).all()
    with np.errstate(divide="ignore"):
        out = np.exp(smooth(np.log(np.array([[0.9, 0.1, 0.0], [1.0, 0.0, 0.0]])), 0.1))
    np.testing.assert_allclose(out, [[0.8, 0.2, 0.0], [1.0, 0.0, 0.0]], atol=1e-12)


def test_error_by_hand():
    """Bins of 0.1, half the tokens each: 0.95 (right, wrong) -> |0.5 - 0.95|; 0.65, 0.7 (right) -> |1 - 0.675|."""
    got = expected_calibration_error(np.array([0.95, 0.95, 0.65, 0.7]), np.array([True, False, True, True]), bins=10)
    assert np.isclose(got, 0.5 * 0.45 + 0.5 * 0.325)
    assert expected_calibration_error(np.ones(3), np.ones(3)) == 0 == expected_calibration_error(np.zeros(2),
                                                                                                 np.zeros(2))
    with pytest.raises(ValueError, match="at least one"):
        expected_calibration_error(np.zeros(0), np.zeros(0))
    for bad in ([1.5], [np.nan]):
        with pytest.raises(ValueError, match="is a probability"):
            expected_calibration_error(np.array(bad), np.array([True]))


@pytest.mark.parametrize("true_temperature", [1.0, 2.0])
def test_search_finds_the_temperature_the_teacher_is_wrong_by(true_temperature):
    """Tokens drawn from p^(1/T) of what the teacher says: the search must return T."""
    rng = np.random.default_rng(0)
    said = temper(np.sort(rng.normal(size=(20_000, 5)) * 2.5)[:, ::-1], 1.0)
    truth = np.exp(temper(said, true_temperature))
    drawn = (truth.cumsum(-1) > rng.random((len(said), 1))).argmax(-1)
    found = search(WAYS["temperature"], said, drawn == 0, grid=(0.5, 1.5, 2.0, 2.5, 4.0))
    assert found.value == true_temperature and found.errors[found.value] < 0.01
    assert 1.0 in found.errors and found.errors[found.value] <= found.errors[1.0]
