"""PPO as one function of a seed, as PureJaxRL has it, on an environment of Gymnax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.nn import log_softmax

POLES, UNROLL, UPDATES, EPOCHS = 8, 64, 60, 8


class ActorCritic(nn.Module):
    """Gives the logits of two actions, and the value of the state."""

    @nn.compact
    def __call__(self, x):
        actor = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh])(x)
        critic = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(64), nn.tanh])(x)
        return nn.Dense(2)(actor * 0.1), nn.Dense(1)(critic)[..., 0]


NETWORK = ActorCritic()


def chosen(logits, action):
    return jnp.take_along_axis(log_softmax(logits), action[..., None], -1)[..., 0]


def loss_fn(params, obs, action, old, advantage, target):
    logits, value = NETWORK.apply(params, obs)
    ratio = jnp.exp(chosen(logits, action) - old)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
    entropy = -jnp.sum(jnp.exp(log_softmax(logits)) * log_softmax(logits), -1)
    return jnp.mean(0.5 * (value - target) ** 2 - gain - 0.01 * entropy)


def play(env, params, carry, key):
    obs, state = carry
    logits, value = NETWORK.apply(params, obs)
    keys = jax.random.split(key, POLES + 1)
    action = jax.random.categorical(keys[0], logits)
    seen, state, reward, fell, cut, _ = jax.vmap(env.step)(keys[1:], state, action)
    old = chosen(logits, action)
    return (seen, state), (obs, action, old, value, reward, fell | cut, fell)


def advantages(reward, value, done, last):
    def backwards(carry, now):  # generalized advantage estimation
        advantage, after = carry
        reward, value, done = now
        delta = reward + 0.99 * after * (1 - done) - value
        advantage = delta + 0.99 * 0.95 * (1 - done) * advantage
        return (advantage, value), advantage

    first = (jnp.zeros_like(last), last)
    return jax.lax.scan(backwards, first, (reward, value, done), reverse=True)[1]


def update(env, tx, carry, key):
    params, opt_state, world = carry
    keys = jax.random.split(key, UNROLL)
    world, seen = jax.lax.scan(functools.partial(play, env, params), world, keys)
    obs, action, old, value, reward, done, fell = seen
    gain = advantages(reward, value, done, NETWORK.apply(params, world[0])[1])
    scaled = (gain - gain.mean()) / (gain.std() + 1e-8)

    def epoch(carry, _):
        params, opt_state = carry
        grads = jax.grad(loss_fn)(params, obs, action, old, scaled, gain + value)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    carry, _ = jax.lax.scan(epoch, (params, opt_state), length=EPOCHS)
    return (*carry, world), jnp.mean(fell)


def train(env, tx, key):
    """Gives the share of steps at which a pole fell, for each update."""
    world = jax.vmap(env.reset)(jax.random.split(key, POLES))
    params = NETWORK.init(key, world[0])
    carry = (params, tx.init(params), world)
    keys = jax.random.split(key, UPDATES)
    return jax.lax.scan(functools.partial(update, env, tx), carry, keys)[1]
