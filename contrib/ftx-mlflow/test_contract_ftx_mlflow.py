"""The observer `mlflow` sits the exam."""

from ftx.testing import ObserverContract
from ftx_mlflow import MLflow


class TestMLflow(ObserverContract):
    plugin = MLflow
    options = [{}]
