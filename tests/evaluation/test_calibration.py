"""Calibration and AUROC against independent implementations and cells with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from scmodelforge.evaluation import calibration


def test_calibration_error_is_that_of_torchmetrics():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.4] * 5, 3000)
    truth = rng.integers(0, 5, 3000)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == truth
    sums = calibration.bin_sums(confidence, correct).sum(0)
    expected = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(truth), num_classes=5, n_bins=10
    )
    assert calibration.calibration_error(sums) == pytest.approx(float(expected), abs=1e-6)


def test_perfect_and_worst_calibration():
    confidence = np.repeat([0.25, 0.75], [8, 8])
    as_sure_as_right = np.repeat([True, False, True, False], [2, 6, 6, 2])
    sums = calibration.bin_sums(confidence, as_sure_as_right).sum(0)
    assert calibration.calibration_error(sums) == 0
    assert calibration.reliability(sums) == [
        {"low": 0.2, "high": 0.3, "n": 8, "confidence": 0.25, "accuracy": 0.25},
        {"low": 0.7, "high": 0.8, "n": 8, "confidence": 0.75, "accuracy": 0.75},
    ]
    sure_and_wrong = calibration.bin_sums(np.ones(5), np.zeros(5, bool)).sum(0)
    assert calibration.calibration_error(sure_and_wrong) == 1


def test_brier_score():
    rng = np.random.default_rng(0)
    probabilities, truth = rng.dirichlet([1, 1, 1], 50), rng.integers(0, 3, 50)
    expected = ((probabilities - np.eye(3)[truth]) ** 2).sum(1)
    np.testing.assert_allclose(calibration.brier(probabilities, truth), expected)
    assert calibration.brier(np.array([[1.0, 0.0]]), np.array([0])) == 0
    assert calibration.brier(np.array([[1.0, 0.0]]), np.array([1])) == 2


def test_auroc_is_that_of_scikit_learn_with_ties_and_weights():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 12, 200) / 12, rng.random(200) < 0.3
    weights = rng.integers(0, 4, (5, 200)).astype(float)
    expected = [roc_auc_score(positive, score, sample_weight=row) for row in weights]
    np.testing.assert_allclose(calibration.auroc(score, positive, weights), expected)
    assert np.isnan(calibration.auroc(score, np.zeros(200, bool), weights)).all()
