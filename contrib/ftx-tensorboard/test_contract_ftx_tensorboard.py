"""The observer `tensorboard` sits the exam."""

from ftx.testing import ObserverContract
from ftx_tensorboard import TensorBoard


class TestTensorBoard(ObserverContract):
    plugin = TensorBoard
    options = [{}]
