"""sb3-contrib: RecurrentPPO learns the same with our LSTMs, converted and written with resets=."""

import sys
from pathlib import Path

import gymnasium
import pytest
import recipes
import torch
from sb3_contrib import RecurrentPPO
from torch_cases import assert_same

import seqcells

pytestmark = pytest.mark.integrations


@pytest.fixture(scope="module")
def with_resets():
    """The page's policy, without a loop over the steps."""
    return recipes.run("Stable-Baselines3", only=1, RecurrentPPO=RecurrentPPO, seqcells=seqcells)["Policy"]


def made(policy, **options):
    """With several environments, whose episodes end inside a rollout: a beginner's pole falls after some 20 steps."""
    options = {"lstm_hidden_size": 8, "net_arch": [8], **options}
    how = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, "policy_kwargs": options, "device": "cpu"}
    env = gymnasium.make("CartPole-v1")
    return RecurrentPPO(policy, env, **how)


def learned(model, steps=96):
    """The parameters after some rollouts and updates; and how many episodes ended."""
    model.learn(steps)
    return {name: p.detach().clone() for name, p in model.policy.named_parameters()}, len(model.ep_info_buffer)


@pytest.mark.parametrize("options", [{}, {"shared_lstm": True, "enable_critic_lstm": False}, {"n_lstm_layers": 2}])
def test_converted_and_with_resets(options, with_resets):
    expected, episodes = learned(made("MlpLstmPolicy", **options))
    assert episodes >= 2
    for policy in ("MlpLstmPolicy", with_resets):
        model = made(policy, **options)
        seqcells.convert(model.policy)
        assert isinstance(model.policy.lstm_actor, seqcells.LSTM)
        found, same = learned(model)
        assert same == episodes
        assert_same(found, expected, str(policy))


def test_a_saved_model_is_torch_nns_and_loads_in_both(tmp_path):
    """The file holds state_dicts: RecurrentPPO.load makes torch.nn's layers, which are converted again."""
    model = made("MlpLstmPolicy")
    seqcells.convert(model.policy)
    learned(model, 32)
    model.save(tmp_path / "model")
    loaded = RecurrentPPO.load(tmp_path / "model", device="cpu")
    assert type(loaded.policy.lstm_actor) is torch.nn.LSTM
    observation = gymnasium.make("CartPole-v1").reset(seed=0)[0]
    actions = [m.predict(observation, deterministic=True) for m in (model, loaded)]
    assert actions[0][0] == actions[1][0]
    states = [{str(i): torch.as_tensor(s) for i, s in enumerate(a[1])} for a in actions]
    assert_same(states[0], states[1], "states")
    assert isinstance(seqcells.convert(loaded.policy).lstm_actor, seqcells.LSTM)


def test_the_benchmark_of_it(tmp_path, capsys):
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import recurrent_ppo

    threads = torch.get_num_threads()
    try:
        assert recurrent_ppo.main(["--steps", "128", "--rounds", "1", "--table", str(tmp_path / "found.md")]) == 0
    finally:
        torch.set_num_threads(threads)
    written = (tmp_path / "found.md").read_text()
    rows = ["RecurrentPPO, 128 steps", "torch.nn", "converted", "resets= everywhere"]
    assert all(f"| {row} |" in written for row in rows) and written in capsys.readouterr().out
