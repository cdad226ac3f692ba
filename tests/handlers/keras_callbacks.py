"""Callbacks in the style of Keras for the tests."""

from toys import batches, trainer_of

from camshaft import KerasStyle
from camshaft.keras_callbacks import METHODS


class Recorder:
    """A callback with every method, which records each call with its arguments."""

    def __init__(self):
        self.calls, self.params, self.model = [], None, None

    def set_params(self, params):
        self.params = params

    def set_model(self, model):
        self.model = model

    def __getattr__(self, name):
        if name not in METHODS:
            raise AttributeError(name)
        return lambda *args: self.calls.append((name, *args))

    def named(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


class Stateful:
    """A callback that counts the epochs of a run, and has a state."""

    def __init__(self):
        self.epochs = None

    def on_train_begin(self, logs):
        self.epochs = 0

    def on_epoch_end(self, epoch, logs):
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


def recorded(trainer=None, data=2, max_epochs=1, **options):
    trainer, recorder = trainer or trainer_of(), Recorder()
    KerasStyle(recorder, **options).attach(trainer)
    trainer.run(batches(data), max_epochs=max_epochs)
    return recorder


def only(**methods):
    """An object with only these methods."""
    return type("Only", (), {name: staticmethod(function) for name, function in methods.items()})()
