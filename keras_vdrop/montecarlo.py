"""`MonteCarlo`: predictions from many draws of the weights."""

import keras
from keras import ops

from keras_vdrop.functional import uncertainty
from keras_vdrop.layers.base import check_positive_int
from keras_vdrop.sampling import FixedSeeds, generator_states, sampling, seed_generator

_LIKELIHOODS = (None, "categorical", "bernoulli", "normal")
_OUTPUTS = ("statistics", "samples")


@keras.saving.register_keras_serializable(package="keras_vdrop")
class MonteCarlo(keras.Model):
    """A model that predicts with S draws of another model's weights, E_q[p(y | x, w)] ≈ mean over w_1 ... w_S ~ q.

    The draws run one after the other inside one compiled graph, so memory is that of one. The wrapped model
    stays as it is and deterministic, and everything in it that is not variational stays in inference mode. A stateful
    RNN starts every draw from the state that it holds, and keeps it.

    Args:
        model: A built `keras.Model` with at least one variational layer.
        num_samples: Positive int, S.
        likelihood: What the outputs are, and so which statistics `predict` gives, as a dict:
            None: `mean` and `variance` over the draws.
            "categorical": outputs (B, ..., C): `probability`, `predictive_entropy` (total), `expected_entropy` (of the
                data), `mutual_information` (of the model), in nats.
            "bernoulli": outputs (B, ...), the probability of 1 or its logit: the same.
            "normal": outputs (B, ..., 2), the loc and the raw scale, of which softplus is the standard
                deviation: `mean`, `aleatoric_variance` and `epistemic_variance`.
        from_logits: Whether the outputs of a categorical or bernoulli model are logits.
        output: "statistics", or "samples" for the outputs themselves, (B, S, ...).
        seed: Int for the same draws in every run, or None.
        consistent: Whether a draw serves all rows, in all batches and calls, instead of each its own: S functions
            drawn from the posterior, with one mask for the whole prediction. (A layer that the model calls twice draws
            twice.)
        **kwargs: `name`, `dtype`.

    Raises:
        ValueError: For a value that is out of range, or a model without variational layers.

    Example:
        >>> import keras, keras_vdrop as kv
        >>> model = keras.Sequential([keras.Input((4,)), kv.VariationalDense(3)])
        >>> statistics = kv.MonteCarlo(model, num_samples=8)(keras.ops.ones((2, 4)))
        >>> statistics["mean"].shape == statistics["variance"].shape == (2, 3)
        True

    Reference:
        Dropout as a Bayesian Approximation, Gal, Ghahramani, 2016, https://arxiv.org/abs/1506.02142
    """

    def __init__(
        self,
        model,
        num_samples=32,
        likelihood=None,
        from_logits=True,
        output="statistics",
        seed=None,
        consistent=False,
        **kwargs,
    ):
        check_positive_int("num_samples", num_samples)
        for name, value, choices in (("likelihood", likelihood, _LIKELIHOODS), ("output", output, _OUTPUTS)):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {choices}. Received: {name}={value!r}")
        if not model.built:
            raise ValueError(f"The model {model.name!r} has not been built: call it on some data first.")
        if not generator_states(model):
            raise ValueError(
                f"Every draw from the model {model.name!r} would be the same: it has no variational layer. "
                "Use one, such as keras_vdrop.VariationalDense, where it has a Keras layer."
            )
        super().__init__(**kwargs)
        self.model = model
        self.seed = seed
        self.seed_generator = seed_generator(seed)
        self.num_samples = num_samples
        self.likelihood = likelihood
        self.from_logits = from_logits
        self.output_kind = output
        self.consistent = bool(consistent)
        self.built = True

    def build(self, input_shape):
        self.built = True

    def samples(self, inputs):
        """The outputs of the wrapped model under S draws, (S, B, ...)."""
        trainable = [ops.convert_to_tensor(variable) for variable in self.model.trainable_variables]
        states = {id(state) for state in generator_states(self.model)}

        def draw(seeds):
            """The outputs when every generator of noise starts from a seed of its own, and all else is as it is."""
            seeds = iter(ops.unstack(seeds))
            others = [
                ops.cast(ops.stack([next(seeds), 0]), variable.dtype)
                if id(variable) in states
                else ops.convert_to_tensor(variable)
                for variable in self.model.non_trainable_variables
            ]
            with sampling(self.consistent):
                outputs, _ = self.model.stateless_call(trainable, others, inputs, training=False)
            return outputs

        shape = (self.num_samples, len(states))
        seeds = FixedSeeds(self.seed_generator.state) if self.consistent else self.seed_generator
        return ops.map(draw, keras.random.randint(shape, 0, 2**31 - 1, seed=seeds))

    def call(self, inputs):
        samples = self.samples(inputs)
        if self.output_kind == "samples":
            return ops.swapaxes(samples, 0, 1)
        if self.likelihood is None:
            mean, variance = uncertainty.moments(samples)
            return {"mean": mean, "variance": variance}
        if self.likelihood == "normal":
            return uncertainty.normal(samples[..., 0], ops.softplus(samples[..., 1]))
        if self.likelihood == "bernoulli":
            probability = ops.sigmoid(samples) if self.from_logits else samples
            return uncertainty.bernoulli(probability)
        return uncertainty.categorical(ops.softmax(samples) if self.from_logits else samples)

    def get_config(self):
        return {
            **super().get_config(),
            "model": keras.saving.serialize_keras_object(self.model),
            "num_samples": self.num_samples,
            "likelihood": self.likelihood,
            "from_logits": self.from_logits,
            "output": self.output_kind,
            "seed": self.seed,
            "consistent": self.consistent,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        model = keras.saving.deserialize_keras_object(config.pop("model"), custom_objects=custom_objects)
        return cls(model, **config)
