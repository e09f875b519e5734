"""The mistakes that `mutants.py` makes in the privacy code, and the privacy tests that must notice.

Each is one edit of today's source: `old` stands in its file exactly once, which tests/test_mutants.py holds it to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

(
    SUMS,
    NOISE,
    PLAN,
    SAMPLING,
    ACCOUNTING,
    GAUSSIAN,
    LEDGER,
    COOCCURRENCE,
    ALS,
    DEVICE_SGD,
    LOCAL,
    FUSED,
    LEARNERS,
    WIRE,
    MECHANISM,
) = (
    f"tests/common/test_{name}.py"
    for name in (
        *("sums", "noise", "plan", "sampling", "accounting", "gaussian", "ledger", "cooccurrence", "als", "device_sgd"),
        *("local_training", "fused", "learners", "wire", "mechanism"),
    )
)
ROUNDS, NODE = "tests/server/test_rounds.py", "tests/client/test_node.py"
SETTINGS = "tests/simulations/test_settings.py"
PRIVACY_TESTS = (
    *(SUMS, NOISE, PLAN, SAMPLING, ACCOUNTING, GAUSSIAN, LEDGER, COOCCURRENCE, ALS, DEVICE_SGD, LOCAL, FUSED),
    *(LEARNERS, WIRE, MECHANISM, ROUNDS, NODE, SETTINGS),
)


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: its first words are the mistake's, the last where there are several places to make it.
        mistake: what the code does then, in a sentence.
        file: path from the repository's root.
        old, new: the edit; `old` stands in the file exactly once.
        test: the file among PRIVACY_TESTS, or a class or test in it, that must fail.
    """

    name: str
    mistake: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, root: Path) -> str:
        """Makes the edit below `root`; the file.

        Raises:
            ValueError: the old text is not there exactly once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (n := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: the old text stands {n} times in {self.file}, not once")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return self.file


_PRIVACY = "common/penchant/common/privacy"
_LEARNERS = "common/penchant/common/learners"
_DEVICE_SGD = f"{_LEARNERS}/neural/device_sgd.py"
_FEDAVG = f"{_LEARNERS}/neural/fedavg.py"
_LOCAL = f"{_LEARNERS}/neural/local.py"
_FUSED = f"{_LEARNERS}/neural/fused"
_KERNELS, _PRIVATE, _COHORT = f"{_FUSED}/kernels.py", f"{_FUSED}/private.py", f"{_FUSED}/cohort.py"
_ROUNDS = "server/penchant/server/rounds.py"
_SETTINGS = "simulations/penchant/simulations/plans.py"
_NODE = "client/penchant/client/node.py"

MUTANTS = (
    # ------------------------------------------------------------------------------------------------------- noise
    Mutant(
        "half-noise",
        "the server's sum gets half the planned noise",
        f"{_PRIVACY}/sums.py",
        "self._stddev = spec.noise_multiplier * self._bound if",
        "self._stddev = spec.noise_multiplier * self._bound / 2 if",
        SUMS,
    ),
    Mutant(
        "half-noise-count",
        "the count beside a quantile clip gets half its noise",
        f"{_PRIVACY}/sums.py",
        "stddev = self._spec.quantile.noise_multiplier / 2 ",
        "stddev = self._spec.quantile.noise_multiplier / 4 ",
        SUMS,
    ),
    Mutant(
        "half-noise-device",
        "a step on the device gets half the planned noise",
        _DEVICE_SGD,
        "noised = noise.add(total, rule.noise_multiplier * rule.clip_norm)",
        "noised = noise.add(total, rule.noise_multiplier * rule.clip_norm / 2)",
        "tests/common/test_device_sgd.py::TestNoise",
    ),
    Mutant(
        "half-noise-moved-clip",
        "noise is scaled to the plan's first C, not to the one that a quantile moved it to",
        f"{_PRIVACY}/sums.py",
        "self._stddev = spec.noise_multiplier * self._bound if",
        "self._stddev = spec.noise_multiplier * spec.clip_norm if",
        f"{SUMS}::test_noise_is_scaled_to_the_clip_of_the_round_and_not_to_the_plans_first",
    ),
    Mutant(
        "no-noise",
        "the server releases the exact sum under its receipt",
        f"{_PRIVACY}/sums.py",
        "(noise.add(total, stddev) if receipt else total)",
        "total",
        SUMS,
    ),
    Mutant(
        "no-noise-empty-round",
        "a round that nobody answered is released without noise",
        f"{_PRIVACY}/sums.py",
        "(noise.add(total, stddev) if receipt else total)",
        "(noise.add(total, stddev) if receipt and total.any() else total)",
        f"{ROUNDS}::test_a_round_that_nobody_answers_releases_noise_and_is_charged",
    ),
    Mutant(
        "no-noise-device",
        "the device sends its clipped gradients without noise",
        _DEVICE_SGD,
        "noised = noise.add(total, rule.noise_multiplier * rule.clip_norm)",
        "noised = total",
        "tests/common/test_device_sgd.py::TestNoise",
    ),
    Mutant(
        "no-noise-empty-step",
        "a step on the device that draws no interaction adds no noise",
        _DEVICE_SGD,
        "            for name, total in self._clipped_sum(now, chosen, random).items():",
        "            for name, total in self._clipped_sum(now, chosen, random).items() if len(chosen) else ():",
        "tests/common/test_device_sgd.py::TestNoise",
    ),
    Mutant(
        "noise-off-the-grid",
        "the noised sum is released with all its low bits",
        f"{_PRIVACY}/noise.py",
        "            np.rint(block, out=block)\n",
        "",
        NOISE,
    ),
    Mutant(
        "seed-reused-round",
        "every round's noise comes from the same key",
        _ROUNDS,
        'key("noise", number, charge)',
        'key("noise", charge)',
        f"{ROUNDS}::test_noise_differs_from_round_to_round",
    ),
    Mutant(
        "seed-reused-attempt",
        "a round run again meets the noise of its first try",
        _ROUNDS,
        'key("noise", number, charge)',
        'key("noise", number)',
        ROUNDS,
    ),
    Mutant(
        "seed-reused-two-servers",
        "noise is named by the try that was opened, so two that charge one round at once share it",
        _ROUNDS,
        "charge = self._now.attempt if receipt is None else receipt.attempt  #",
        "charge = self._now.attempt  #",
        ROUNDS,
    ),
    Mutant(
        "seed-reused-coins",
        "every round tosses the coins of the first",
        f"{_PRIVACY}/sampling.py",
        'streams.key("cohort", round, attempt)',
        'streams.key("cohort", attempt)',
        f"{SAMPLING}::test_poisson_draws_each_user_and_each_cohort_as_binomial_counts",
    ),
    Mutant(
        "seed-reused-order",
        "an order that is sent again meets the device's noise again",
        _NODE,
        "self._first_user + users, taken)",
        "self._first_user + users)",
        NODE,
    ),
    Mutant(
        "seed-reused-people",
        "all people of a node share one stream of noise",
        _NODE,
        "order.attempt, self._first_user + users, taken)",
        "order.attempt, taken)",
        f"{NODE}::test_another_round_try_or_person_draws_from_another_stream",
    ),
    Mutant(
        "seed-reused-steps",
        "every step of every device adds the same noise",
        _DEVICE_SGD,
        "noised = noise.add(",
        "noised = Noise(bytes(KEY_BYTES)).add(",
        "tests/common/test_device_sgd.py::TestNoise::test_of_one_device_is_independent_from_step_to_step_and_call_to_call",
    ),
    # -------------------------------------------------------------------------------------------------------- clip
    Mutant(
        "clip-off-on-one-tensor",
        "arrays of one dimension, the biases, are left as they are",
        f"{_PRIVACY}/sums.py",
        "(np.asarray(v, np.float64) * scale)",
        "(np.asarray(v, np.float64) * (1.0 if np.ndim(v) == 1 else scale))",
        SUMS,
    ),
    Mutant(
        "clip-each-tensor-alone",
        "each array is clipped to C by itself, not all as one vector",
        f"{_PRIVACY}/sums.py",
        "(np.asarray(v, np.float64) * scale)",
        "(np.asarray(v, np.float64) * min(1.0, self.bound * SAFETY / max(norm({name: v}), 1e-300)))",
        f"{SUMS}::test_several_arrays_are_clipped_as_one_flat_vector_and_not_each_for_itself",
    ),
    Mutant(
        "clip-after-averaging",
        "a node clips the sum of its people, not each of them",
        f"{_LEARNERS}/contract.py",
        "            for name, values in clip(self.contribution(state, history, randoms(row))).items():\n"
        "                total[name] += values\n"
        "        return total\n",
        "            for name, values in self.contribution(state, history, randoms(row)).items():\n"
        "                total[name] += values\n"
        "        return dict(clip(total))\n",
        f"{NODE}::test_a_node_sends_the_sum_of_clipped_contributions_and_not_their_clipped_sum",
    ),
    Mutant(
        "clip-after-averaging-fedavg",
        "people trained as one block are clipped once, as a sum",
        _FEDAVG,
        "            self._add(total, rows, clip(values))  # rows that were not touched are zero\n"
        "            seen += 1\n"
        "        for _ in range(histories.n_users - seen):  # nothing to train on: a contribution of zeros\n"
        "            clip({})\n"
        "        return total\n",
        "            self._add(total, rows, values)\n            seen += 1\n        return dict(clip(total))\n",
        LEARNERS,
    ),
    Mutant(
        "clip-left-out-compiled",
        "the compiled path adds what people send as it is",
        _KERNELS,
        "    scale = 1.0 if within else bound * safety / length\n",
        "    scale = 1.0\n",
        f"{FUSED}::test_a_cohort_s_sum_is_that_of_the_plain_path",
    ),
    Mutant(
        "clip-left-out-compiled-part",
        "the compiled path leaves biases out of the norm",
        _KERNELS,
        "            square += np.float64(own.bias[r]) * np.float64(own.bias[r])\n",
        "            square += 0.0\n",
        f"{FUSED}::test_a_cohort_s_sum_is_that_of_the_plain_path",
    ),
    Mutant(
        "clip-left-out-compiled-group",
        "compiled DP-SGD does not clip a group's gradient",
        _PRIVATE,
        "            scale = np.float32(min(1.0, bound / math.sqrt(square_length)) if square_length > 0.0 else 1.0)\n",
        "            scale = np.float32(1.0)\n",
        f"{FUSED}::test_dp_sgd_of_a_cohort_is_opacus_for_each_but_for_the_noise",
    ),
    Mutant(
        "clip-left-out-compiled-user",
        "compiled DP-SGD leaves the person's vector out of a group's norm",
        _PRIVATE,
        "(1.0 + dot(own.user_network, 0, own.user_network, 0, dn))  # b₁, W₁ᵘ\n",
        "(1.0)  # b₁, W₁ᵘ\n",
        f"{FUSED}::test_dp_sgd_of_a_cohort_is_opacus_for_each_but_for_the_noise",
    ),
    Mutant(
        "noise-left-out-compiled",
        "compiled DP-SGD adds no noise to what is not a table",
        _PRIVATE,
        "                    own.dense[i] += move * one\n",
        "                    own.dense[i] += 0.0 * one\n",
        f"{FUSED}::TestNoise::test_every_number_has_all_of_it_read_or_not",
    ),
    Mutant(
        "noise-too-small-compiled-read",
        "a row that is read gets one step's noise, whatever it is owed",
        _PRIVATE,
        "move * math.sqrt(np.float64(at_step - last[r]))",
        "move * 1.0",
        f"{FUSED}::TestNoise::test_every_number_has_all_of_it_read_or_not",
    ),
    Mutant(
        "noise-too-small-compiled-sum",
        "what is owed at the end lacks the last step's noise",
        _COHORT,
        "np.sqrt(n * rule.steps - drawn)",
        "np.sqrt(np.maximum(n * (rule.steps - 1) - drawn, 0))",
        f"{FUSED}::TestNoise::test_every_number_has_all_of_it_read_or_not",
    ),
    Mutant(
        "noise-of-a-sum-in-a-change",
        "noise that is exact for a sum alone stays where a change is clipped",
        _FEDAVG,
        "            if clip.bound == math.inf and not self.frozen:  # else a change is looked at alone\n",
        "            if not self.frozen:\n",
        f"{FUSED}::TestNoise::test_a_sum_that_something_else_looks_at_is_made_person_by_person",
    ),
    Mutant(
        "clip-after-averaging-cooccurrence",
        "people's pairs are counted unscaled and the sum is clipped",
        f"{_LEARNERS}/cooccurrence.py",
        "                np.add.at(total, found.at, clipped[found.who, found.level])\n        return {name: total}\n",
        "                np.add.at(total, found.at, 1.0)\n        return dict(clip({name: total}))\n",
        LEARNERS,
    ),
    Mutant(
        "clip-at-once-counts-a-value-once",
        "people clipped at once are clipped as if each of their values stood at one place",
        f"{_PRIVACY}/sums.py",
        "(times * wide * wide).sum(axis=1)",
        "(wide * wide).sum(axis=1)",
        SUMS,
    ),
    Mutant(
        "clip-at-once-of-all-together",
        "people clipped at once are clipped as one",
        f"{_PRIVACY}/sums.py",
        "length = np.sqrt((times * wide * wide).sum(axis=1))",
        "length = np.sqrt((times * wide * wide).sum()) / max(len(values), 1) ** 0.5 + 0 * wide[:, 0]",
        SUMS,
    ),
    Mutant(
        "clip-of-another-sum",
        "every round is clipped to the first sum's C",
        _NODE,
        "clip = Clip(spec.bound(state), spec.row_norm)",
        "clip = Clip(self._plan.sums[0].bound(state), spec.row_norm)",
        NODE,
    ),
    Mutant(
        "server-re-clip-off",
        "the server adds whatever a node sends",
        "common/penchant/common/privacy/sums.py",
        "scale = bound * SAFETY / length if over else 1.0",
        "scale = 1.0",
        "tests/server/test_rounds.py",
    ),
    Mutant(
        "server-re-clip-off-count",
        "the server adds whatever a node counts as within its clip",
        f"{_PRIVACY}/sums.py",
        "np.clip(np.trunc(2 * within) / 2, -users / 2, users / 2)",
        "np.trunc(2 * within) / 2",
        SUMS,
    ),
    Mutant(
        "server-re-clip-of-the-largest-node",
        "every node may say as much as the one with the most people",
        _ROUNDS,
        "users=self._roster[reply.node]",
        "users=max(self._roster)",
        ROUNDS,
    ),
    Mutant(
        "user-vector-sent",
        "the person's own vector leaves the device, unclipped and unnoised by the server",
        _LOCAL,
        "if name not in {*private, *fixed}}",
        "if name not in fixed}",
        f"{LOCAL}::TestBlock::test_the_persons_own_vector_is_not_sent",
    ),
    Mutant(
        "user-vector-sent-device",
        "the person's own vector leaves the device after DP-SGD",
        _DEVICE_SGD,
        "{*self._private, *self._frozen}",
        "{*self._frozen}",
        "tests/common/test_device_sgd.py::TestPersonalVector",
    ),
    Mutant(
        "frozen-in-the-clip",
        "DP-SGD trains, clips and sends weights that are frozen",
        _FEDAVG,
        "DeviceSgd(self.model, noise, self.config.local, self.frozen)",
        "DeviceSgd(self.model, noise, self.config.local)",
        f"{LEARNERS}::TestEveryLearner::test_a_contribution_is_what_the_round_asks_for",
    ),
    Mutant(
        "frozen-gets-noise",
        "the server's sum has room, and noise, for weights that are frozen",
        _FEDAVG,
        "if n not in self.model.private and n not in self.frozen}",
        "if n not in self.model.private}",
        f"{LOCAL}::TestParts::test_a_frozen_weight_is_in_no_contribution_and_no_round_moves_it",
    ),
    Mutant(
        "warm-start-uncharged",
        "noise is calibrated to the updates alone, as if co-occurrence's sums before them cost nothing",
        _SETTINGS,
        "    if private:\n        sigma = settings.noise_multiplier or "
        "accounting.calibrate(lambda s: plan(s).events(), epsilon, delta)",
        "    if private:\n        sigma = settings.noise_multiplier or "
        "accounting.calibrate(lambda s: plan(s).events()[-1:], epsilon, delta)",
        f"{SETTINGS}::test_a_warm_start_carries_its_charge",
    ),
    Mutant(
        "warm-start-without-noise",
        "whoever sends a state without weights gets a device's exact co-occurrence under unit interaction",
        _FEDAVG,
        'return self.config.start == "co-occurrence" and next(iter(self._shapes)) not in state',
        "return next(iter(self._shapes)) not in state",
        f"{DEVICE_SGD}::TestFrozen::test_no_state_makes_a_device_send_its_items_without_noise",
    ),
    Mutant(
        "user-vector-outside-the-clip",
        "DP-SGD trains the person's vector, and its gradient does not count in the clipped norm",
        _DEVICE_SGD,
        "    for values in samples.values():\n",
        '    for values in (v for name, v in samples.items() if not name.startswith("user")):\n',
        f"{DEVICE_SGD}::TestPersonalVector",
    ),
    Mutant(
        "user-vector-kept",
        "DP-SGD starts from the vector that the last person's training left",
        _DEVICE_SGD,
        "                else:\n                    parameter.copy_(weights[name])",
        "                elif name not in self._private:\n                    parameter.copy_(weights[name])",
        "tests/common/test_device_sgd.py::TestUpdate",
    ),
    Mutant(
        "one-malformed-takes-the-node",
        "one person whose contribution is not finite takes the whole node's sum with them",
        "common/penchant/common/privacy/sums.py",
        "        except MalformedContribution:\n            self.refused += 1",
        "        except ZeroDivisionError:\n            self.refused += 1",
        "tests/client/test_node.py::test_one_person_who_cannot_be_bounded_does_not_take_the_others_with_them",
    ),
    Mutant(
        "one-capped-takes-the-node",
        "one person at their cap makes the node refuse everybody",
        _NODE,
        "if len(users) and not len(room):",
        "if len(room) < len(users):",
        "tests/client/test_node.py::test_one_person_at_their_cap_does_not_take_the_others_with_them",
    ),
    Mutant(
        "gradient-not-finite-kept",
        "a gradient that is not finite leaves the clip as it came",
        _DEVICE_SGD,
        "torch.nan_to_num(values.double(), nan=0.0, posinf=0.0, neginf=0.0).cpu().numpy()",
        "values.double().cpu().numpy()",
        f"{DEVICE_SGD}::TestClip::test_no_weights_make_one_interaction_count_for_more_or_fail_the_device",
    ),
    Mutant(
        "norm-of-the-row-only",
        "the norm that clips a sample leaves out the item tables",
        _DEVICE_SGD,
        "        square += (values.double() ** 2).flatten(1).sum(1).cpu()",
        "        square += (values.double() ** 2).flatten(1).sum(1).cpu() * (values.dim() < 3 or values.shape[1] == 1)",
        "tests/common/test_device_sgd.py::TestClip",
    ),
    Mutant(
        "task-not-checked",
        "a device trains with whatever settings an order names",
        _NODE,
        "if self._plan.task and self._plan.task != task_digest(order.learner, order.settings):",
        "if False:",
        "tests/client/test_node.py::test_a_device_that_enrolled_for_one_task_refuses_another",
    ),
    Mutant(
        "fresh-ledger-on-resume",
        "a run goes on with a ledger that lacks its charges",
        _ROUNDS,
        "if any(plan.event(r) and not ledger.attempts(r, plan.digest) for r in range(1, self.progress.done + 1)):",
        "if False:",
        "tests/server/test_rounds.py::test_a_run_does_not_go_on_with_a_ledger_that_lacks_its_charges",
    ),
    Mutant(
        "receipt-of-another-event",
        "a receipt of any event of the same noise lets a sum out",
        "common/penchant/common/privacy/sums.py",
        'if receipt.entry.kind != "charge" or self._event not in (None, receipt.event):',
        'if receipt.entry.kind != "charge":',
        "tests/common/test_sums.py::test_a_receipt_of_another_event_or_of_a_participation_is_refused",
    ),
    Mutant(
        "negatives-as-separate-samples",
        "a positive and each of its negatives are clipped one by one, so one interaction moves a step by (1 + k)·C",
        _DEVICE_SGD,
        "        group_loss(self._module(candidates[:, :0], candidates)).sum().backward()",
        "        flat = candidates.reshape(-1, 1)\n"
        "        logits = self._module(flat[:, :0], flat)[:, 0]\n"
        "        positive = torch.arange(len(flat)) % candidates.shape[1] == 0\n"
        "        losses = (torch.nn.functional.softplus(logits) - logits * positive) / candidates.shape[1]\n"
        "        losses.sum().backward()",
        "tests/common/test_device_sgd.py::TestClip",
    ),
    # ------------------------------------------------------------------------------------------- weights and divisor
    Mutant(
        "weights-by-example-counts",
        "a contribution is weighted by how long its history is, after the clip",
        f"{_LEARNERS}/contract.py",
        "                total[name] += values\n",
        "                total[name] += values * len(history)\n",
        NODE,
    ),
    Mutant(
        "weights-by-example-counts-fedavg",
        "an update is weighted by how many rows it touched, after the clip",
        _FEDAVG,
        "self._add(total, rows, clip(values))",
        "self._add(total, rows, {n: v * np.size(rows) for n, v in clip(values).items()})",
        LEARNERS,
    ),
    Mutant(
        "weights-by-example-counts-cooccurrence",
        "a person's counts are weighted by the length of their history, after the clip",
        f"{_LEARNERS}/cooccurrence.py",
        "clipped[found.who, found.level])",
        "clipped[found.who, found.level] * found.times.sum(axis=1)[found.who])",
        LEARNERS,
    ),
    Mutant(
        "divide-by-who-answered",
        "the noised sum is divided by the nodes that answered",
        _ROUNDS,
        "self.learner.apply(state, noisy, self.plan.divisor)",
        "self.learner.apply(state, noisy, float(max(len(heard), 1)))",
        f"{ROUNDS}::test_the_divisor_is_the_plans_whoever_is_drawn_and_answers",
    ),
    Mutant(
        "divide-by-who-was-drawn",
        "the noised sum is divided by the users of this round's draw",
        _ROUNDS,
        "self.learner.apply(state, noisy, self.plan.divisor)",
        "self.learner.apply(state, noisy, float(max(drawn, 1)))",
        f"{ROUNDS}::test_the_divisor_is_the_plans_whoever_is_drawn_and_answers",
    ),
    Mutant(
        "divide-by-own-history",
        "the device divides its noisy gradients by the length of the history",
        _DEVICE_SGD,
        "self._local.lr / rule.divisor * noised",
        "self._local.lr / max(len(history.items), 1) * noised",
        "tests/common/test_device_sgd.py::TestHistoryLength",
    ),
    # -------------------------------------------------------------------------------------------------------- sums
    Mutant(
        "float-sum-off-the-grid",
        "clipped values keep all their bits, so the sum rounds and depends on its order",
        f"{_PRIVACY}/sums.py",
        "return np.trunc(wide / step) * step if step else wide",
        "return wide",
        f"{SUMS}::test_a_sum_off_the_grid_would_round_and_the_order_would_show",
    ),
    Mutant(
        "float-sum-off-the-grid-server",
        "what a node sends is added as it is scaled, off the grid",
        f"{_PRIVACY}/sums.py",
        "+= on_grid(flat[block] * scale, self._bound)",
        "+= flat[block] * scale",
        f"{SUMS}::test_what_a_node_sends_off_the_grid_is_cut_before_it_is_added",
    ),
    Mutant(
        "float-sum-in-single-precision",
        "the server adds up in float32",
        f"{_PRIVACY}/sums.py",
        "np.zeros(sum(math.prod(shape) for shape in shapes.values()))",
        "np.zeros(sum(math.prod(shape) for shape in shapes.values()), np.float32)",
        f"{SUMS}::test_what_a_node_sends_off_the_grid_is_cut_before_it_is_added",
    ),
    Mutant(
        "duplicates-counted-twice",
        "a node's second reply is added to its first",
        _ROUNDS,
        'return "duplicate" if reply.node in heard else ""',
        'return ""',
        ROUNDS,
    ),
    Mutant(
        "duplicates-counted-twice-node",
        "a user whom an order names twice is added twice",
        _NODE,
        "if len(np.unique(users)) != len(users) or (",
        "if (",
        NODE,
    ),
    # ---------------------------------------------------------------------------------------------------- sampling
    Mutant(
        "poisson-claimed-but-fixed-size",
        "as many users as the plan expects are drawn, whatever the coins say",
        f"{_PRIVACY}/sampling.py",
        "drawn = np.flatnonzero(coins < plan.rate)",
        "drawn = np.sort(np.argsort(coins)[: plan.cohort])",
        SAMPLING,
    ),
    Mutant(
        "poisson-claimed-but-topped-up",
        "an empty cohort is topped up with whoever came nearest",
        f"{_PRIVACY}/sampling.py",
        "drawn = np.flatnonzero(coins < plan.rate)",
        "drawn = np.flatnonzero(coins <= max(plan.rate, coins.min()))",
        SAMPLING,
    ),
    Mutant(
        "poisson-claimed-but-fixed-size-device",
        "a step on the device takes a fixed share of the history, no coins",
        _DEVICE_SGD,
        "chosen = items[random.random(len(items)) < rule.rate]",
        "chosen = random.choice(items, round(len(items) * rule.rate), replace=False)",
        "tests/common/test_device_sgd.py::TestSampling",
    ),
    Mutant(
        "one-coin-per-node",
        "a node with one drawn user answers for all it hosts",
        _ROUNDS,
        "users=tuple((own - self._first[node]).tolist()),",
        "users=tuple(range(self._roster[node])),",
        ROUNDS,
    ),
    Mutant(
        "one-coin-per-pair",
        "neighbours on the roster share a coin",
        f"{_PRIVACY}/sampling.py",
        "uniform(plan.n_users)",
        "uniform(plan.n_users).repeat(2)[: plan.n_users]",
        SAMPLING,
    ),
    Mutant(
        "sampling-rate-of-another-cohort-charged",
        "a round is charged at the rate of a cohort a tenth smaller than is drawn",
        f"{_PRIVACY}/plan.py",
        "PoissonGaussian(noise_multiplier=spec.charged_multiplier, rate=self.rate)",
        "PoissonGaussian(noise_multiplier=spec.charged_multiplier, rate=self.rate * 0.9)",
        PLAN,
    ),
    Mutant(
        "sampling-rate-of-another-cohort-drawn",
        "a cohort a tenth larger is drawn, so that enough answer",
        f"{_PRIVACY}/sampling.py",
        "drawn = np.flatnonzero(coins < plan.rate)",
        "drawn = np.flatnonzero(coins < 1.1 * plan.rate)",
        SAMPLING,
    ),
    Mutant(
        "participation-cap-not-enforced-draw",
        "users past the cap are drawn",
        f"{_PRIVACY}/sampling.py",
        "free = np.flatnonzero(participations < plan.max_participations)",
        "free = np.arange(plan.n_users)",
        f"{SAMPLING}::test_a_user_at_the_cap_is_never_drawn",
    ),
    Mutant(
        "participation-cap-not-enforced-own-rounds",
        "a profile's schedule holds k + 1 rounds",
        f"{_PRIVACY}/sampling.py",
        "(own < own[:, [round - 1]]).sum(axis=1) < cap",
        "(own < own[:, [round - 1]]).sum(axis=1) <= cap",
        SAMPLING,
    ),
    Mutant(
        "participation-cap-not-enforced-own-coins",
        "a profile goes on tossing its coins after k rounds",
        f"{_PRIVACY}/sampling.py",
        "joins[:, round - 1] & (joins[:, : round - 1].sum(axis=1) < cap)",
        "joins[:, round - 1]",
        SAMPLING,
    ),
    Mutant(
        "participation-cap-not-enforced-node",
        "a node answers for a user once more than the cap",
        _NODE,
        "room = users[self.participations[users] < self._plan.max_participations]",
        "room = users[self.participations[users] <= self._plan.max_participations]",
        "tests/client/test_node.py",
    ),
    Mutant(
        "participation-cap-not-enforced-device",
        "a device's ledger writes down a participation past the cap",
        f"{_PRIVACY}/ledger.py",
        "if cap is not None and not further and len(taken) >= cap:",
        "if cap is not None and not further and len(taken) > cap:",
        LEDGER,
    ),
    # ---------------------------------------------------------------------------------------- interaction on devices
    Mutant(
        "history-in-the-input",
        "a model that reads the history is trained under unit interaction",
        _FEDAVG,
        "if config.device is not None and self.model.reads_history:",
        "if config.device is not None and not self.model.item_tables:",
        f"{DEVICE_SGD}::test_a_sequence_model_is_refused_in_one_line_that_says_how_to_mend_it",
    ),
    Mutant(
        "history-in-the-negatives",
        "negatives avoid the other interactions of the step",
        _DEVICE_SGD,
        "drawn = random.integers(0, self._n_items, (len(chosen), self._local.negatives))",
        "others = np.setdiff1d(np.arange(self._n_items), chosen)\n"
        "        drawn = random.choice(others, (len(chosen), self._local.negatives))",
        f"{DEVICE_SGD}::TestSampling",
    ),
    Mutant(
        "history-in-the-noise",
        "the key of a device's noise depends on the length of the history",
        _DEVICE_SGD,
        "noise = Noise(random.spawn(1)[0].bytes(KEY_BYTES))",
        "noise = Noise(np.random.default_rng(len(history.items)).bytes(KEY_BYTES))",
        "tests/common/test_device_sgd.py::TestHistoryLength",
    ),
    Mutant(
        "history-below-the-minimum",
        "a history that reaches the minimum takes part whole, so one interaction more brings m samples",
        _DEVICE_SGD,
        "items = history.items[rule.min_history - 1 :]",
        "items = history.items if len(history.items) >= rule.min_history else history.items[:0]",
        "tests/common/test_device_sgd.py::TestHistoryLength",
    ),
    Mutant(
        "steps-follow-the-loader",
        "a device takes as many steps as its history has batches",
        _DEVICE_SGD,
        "for _ in range(rule.steps):",
        "for _ in range(-(-len(items) // 4)):",
        "tests/common/test_device_sgd.py::TestHistoryLength::test_steps_and_noise_draws_are_the_same_for_every_history",
    ),
    # ---------------------------------------------------------------------------------------------- what is charged
    Mutant(
        "ledger-skipped",
        "a noised sum is released without a receipt",
        f"{_PRIVACY}/sums.py",
        "        if charged != self._spec.charged_multiplier:\n",
        "        if receipt is not None and charged != self._spec.charged_multiplier:\n",
        SUMS,
    ),
    Mutant(
        "ledger-skipped-empty-round",
        "a round that nobody answered is not charged",
        _ROUNDS,
        "        if event is not None:\n            receipt = ",
        "        if event is not None and heard:\n            receipt = ",
        f"{ROUNDS}::test_a_round_that_nobody_answers_releases_noise_and_is_charged",
    ),
    Mutant(
        "ledger-skipped-repeat",
        "a round run again counts under the cap as if it were its first try",
        f"{_PRIVACY}/ledger.py",
        "repeat=entry.attempt > 0)",
        "repeat=False)",
        f"{LEDGER}::test_of_a_plan_with_a_cap_the_least_noisy_first_tries_count_and_every_repeat",
    ),
    Mutant(
        "ledger-skipped-repeat-guarantee",
        "the guarantee that is printed leaves rounds that were run again out",
        _ROUNDS,
        "self.plan.guarantee(rounds, self.ledger.neighbours, self.ledger.repeated(self.plan.digest))",
        "self.plan.guarantee(rounds, self.ledger.neighbours)",
        ROUNDS,
    ),
    Mutant(
        "ledger-skipped-equal-charges",
        "a second charge of an equal event counts once",
        f"{_PRIVACY}/ledger.py",
        "Counter())[charge] += entry.event.count",
        "Counter())[charge] = entry.event.count",
        LEDGER,
    ),
    Mutant(
        "ledger-skipped-device",
        "a device notes that somebody took part, and charges nothing for it",
        _NODE,
        "event, cap, kept, spent = self._plan.device_event(), self._plan.max_participations, [], over",
        "event, cap, kept, spent = None, self._plan.max_participations, [], over",
        "tests/client/test_node.py",
    ),
    Mutant(
        "ledger-skipped-budget",
        "a budget is held for one event, not for it and all before",
        f"{_PRIVACY}/ledger.py",
        "after = self._bound(profile, Counter({charge: event.count})).epsilon",
        "after = accounting.epsilon([event], self.delta, self.neighbours).epsilon",
        LEDGER,
    ),
    Mutant(
        "second-ledger-receipt-used-twice",
        "one receipt lets two learners' sums out",
        f"{_PRIVACY}/ledger.py",
        "if not self._unspent.acquire(blocking=False):",
        "if not self._unspent.acquire(blocking=False) and not self._unspent.locked():",
        f"{LEDGER}::test_a_receipt_is_good_for_one_release_whoever_comes_first",
    ),
    Mutant(
        "second-ledger-receipt-not-spent",
        "a release does not use its receipt up",
        "common/penchant/common/privacy/sums.py",
        "            receipt.spend()\n",
        "",
        "tests/common/test_sums.py::test_a_receipt_is_good_for_one_release",
    ),
    Mutant(
        "second-ledger-receipt-of-other-noise",
        "a charge for ten times the noise lets a sum out",
        f"{_PRIVACY}/sums.py",
        "if charged != self._spec.charged_multiplier:",
        "if (charged > 0) != (self._spec.charged_multiplier > 0):",
        SUMS,
    ),
    Mutant(
        "second-ledger-receipt-of-another",
        "a release is written down under a charge that another ledger holds",
        f"{_PRIVACY}/ledger.py",
        "if found != (hash,):",
        "if found is None:",
        LEDGER,
    ),
    Mutant(
        "second-ledger-of-another-population",
        "rounds charge the ledger of other people",
        _ROUNDS,
        "if ledger.population != plan.population:",
        "if not ledger.population:",
        ROUNDS,
    ),
    Mutant(
        "second-ledger-one-cap-for-all-plans",
        "two learners' plans share the k rounds that one of them promises",
        f"{_PRIVACY}/ledger.py",
        "capped.setdefault((charge.plan, charge.cap), Counter())",
        'capped.setdefault(("", charge.cap), Counter())',
        LEDGER,
    ),
    Mutant(
        "second-ledger-one-count-of-tries",
        "another plan's try at a round counts as a try of this one's",
        f"{_PRIVACY}/ledger.py",
        "self.tries[entry.plan, entry.round] += 1",
        'self.tries["", entry.round] += 1',
        LEDGER,
    ),
    Mutant(
        "whole-mu-for-both-sums",
        "each of the co-occurrence sums gets the noise of the whole μ",
        f"{_LEARNERS}/cooccurrence.py",
        "noise_multiplier=1 / (mu * math.sqrt(share))",
        "noise_multiplier=1 / mu",
        COOCCURRENCE,
    ),
    Mutant(
        "whole-mu-for-each-sweep",
        "each sweep of least squares gets the noise of what all of them share",
        f"{_LEARNERS}/als.py",
        "1 / (mu * math.sqrt(share / rounds))",
        "1 / (mu * math.sqrt(share))",
        f"{ALS}::TestSplit",
    ),
    Mutant(
        "whole-mu-for-each-sum-of-als",
        "counts, matrix and sweeps of least squares each get the noise of the whole μ",
        f"{_LEARNERS}/als.py",
        "1 / (mu * math.sqrt(share / rounds))",
        "1 / (mu * math.sqrt(1 / rounds))",
        f"{ALS}::TestSplit",
    ),
    Mutant(
        "als-item-weights-not-bounded",
        "a person's weights over items have no common bound: a long history sends more",
        f"{_LEARNERS}/als.py",
        "scale = min(1 / float(np.linalg.norm(weight)), 1 / m)",
        "scale = 1 / m",
        f"{ALS}::TestContribution",
    ),
    Mutant(
        "als-stretches-not-bounded",
        "the squares of a person's many tastes add up to more than their share of the sum",
        f"{_LEARNERS}/als.py",
        "scale = min(1 / float(np.linalg.norm(weight)), 1 / m)",
        "scale = 1 / float(np.linalg.norm(weight))",
        f"{ALS}::TestContribution",
    ),
    Mutant(
        "als-tastes-not-cut",
        "a taste longer than c goes into the statistics as it is",
        f"{_LEARNERS}/als.py",
        "tastes /= np.maximum(config.clip, np.linalg.norm(tastes, axis=1))[:, None]",
        "tastes /= config.clip",
        f"{ALS}::TestContribution",
    ),
    Mutant(
        "als-off-diagonal-twice",
        "what is off the diagonal counts twice instead of √2 times, so half a square is longer than the square",
        f"{_LEARNERS}/als.py",
        "out: Float64 = matrices[..., i, j] * np.where(i == j, 1.0, math.sqrt(2))",
        "out: Float64 = matrices[..., i, j] * np.where(i == j, 1.0, 2.0)",
        f"{ALS}::TestHalfVectors",
    ),
    Mutant(
        "als-parts-each-of-length-one",
        "squares, sums and gram may each be 1 long, so the three together are √3",
        f"{_LEARNERS}/als.py",
        "tuple((parts / np.linalg.norm(parts)).tolist())",
        "tuple((parts / parts).tolist())",
        f"{ALS}::TestContribution",
    ),
    Mutant(
        "clip-left-out-als",
        "a person's statistics are summed without a clip",
        f"{_LEARNERS}/als.py",
        'part = clip({"gram": gram, "items": rows})',
        'part = {"gram": gram, "items": rows}',
        LEARNERS,
    ),
    Mutant(
        "quantile-count-not-charged",
        "the noised count that moves a clip costs nothing",
        f"{_PRIVACY}/plan.py",
        "return 1 / math.hypot(1 / self.noise_multiplier, 1 / self.quantile.noise_multiplier)",
        "return self.noise_multiplier",
        PLAN,
    ),
    Mutant(
        "plan-of-the-order",
        "a device follows whatever plan an order brings",
        _NODE,
        "if order.plan.digest != self._digest:",
        "if order.plan.population != self._plan.population:",
        NODE,
    ),
    # --------------------------------------------------------------------------------------------------- accounting
    Mutant(
        "delta-forgotten",
        "a δ of one over the users or more is accepted",
        f"{_PRIVACY}/plan.py",
        'if self.unit != "none" and not 0 < self.delta < 1 / self.n_users:',
        'if self.unit != "none" and not 0 < self.delta < 1:',
        PLAN,
    ),
    Mutant(
        "delta-forgotten-guarantee",
        "a plan's ε is that of the usual δ of 1e-5, and printed beside the plan's",
        "common/penchant/common/privacy/plan.py",
        "accounting.epsilon((*self.events(rounds), *repeated), self.delta, neighbours, self.unit)",
        "accounting.epsilon((*self.events(rounds), *repeated), 1e-5, neighbours, self.unit)",
        "tests/common/test_plan.py::test_a_guarantee_is_at_the_plans_own_delta",
    ),
    Mutant(
        "delta-forgotten-ledger",
        "a ledger holds its budget at the usual δ of 1e-5, not at its own",
        f"{_PRIVACY}/ledger.py",
        "accounting.epsilon(events, self.delta, self.neighbours) for events in each",
        "accounting.epsilon(events, 1e-5, self.neighbours) for events in each",
        f"{ROUNDS}::test_a_budget_is_held_at_the_ledgers_own_delta",
    ),
    Mutant(
        "delta-forgotten-closed-form",
        "the closed form is read at the usual δ of 1e-5",
        f"{_PRIVACY}/accounting.py",
        "gaussian.epsilon_of(mu, delta)",
        "gaussian.epsilon_of(mu, 1e-5)",
        f"{PLAN}::test_a_guarantee_is_at_the_plans_own_delta",
    ),
    Mutant(
        "delta-forgotten-sampled",
        "sampled events are read at the usual δ of 1e-5",
        f"{_PRIVACY}/accounting.py",
        "first.get_epsilon_for_delta(delta)",
        "first.get_epsilon_for_delta(1e-5)",
        f"{PLAN}::test_a_guarantee_is_at_the_plans_own_delta",
    ),
    Mutant(
        "sensitivity-1-for-replace",
        "replacing a person is charged as removing one, in the closed form",
        f"{_PRIVACY}/accounting.py",
        'return 2.0 if neighbours == "replace" else 1.0',
        "return 1.0",
        f"{SUMS}::test_the_charge_for_neighbours_that_replace_one_another_is_for_twice_the_bound",
    ),
    Mutant(
        "sensitivity-1-for-replace-sampled",
        "replacing a person is charged as removing one, where people are sampled",
        f"{_PRIVACY}/accounting.py",
        'relation.REPLACE_ONE if neighbours == "replace" else relation.ADD_OR_REMOVE_ONE',
        "relation.ADD_OR_REMOVE_ONE",
        f"{PLAN}::test_the_cost_grows_with_every_round_and_a_replaced_profile_costs_more_than_a_removed_one",
    ),
    Mutant(
        "sensitivity-1-for-replace-clip",
        "a clip says that replacing a person moves a sum by C",
        f"{_PRIVACY}/sums.py",
        'return self.bound * (2.0 if neighbours == "replace" else 1.0)',
        "return self.bound",
        f"{SUMS}::test_one_person_replaced_moves_the_sum_by_at_most_twice_the_bound",
    ),
    Mutant(
        "count-forgotten",
        "many releases counted together cost as much as one, in the closed form",
        f"{_PRIVACY}/accounting.py",
        "math.sqrt(e.count) / e.noise_multiplier",
        "1 / e.noise_multiplier",
        f"{PLAN}::test_golden_plans_cost_what_dp_accounting_says",
    ),
    Mutant(
        "count-forgotten-sampled",
        "many sampled releases counted together cost as much as one",
        f"{_PRIVACY}/accounting.py",
        ".self_compose(event.count)",
        ".self_compose(1)",
        f"{PLAN}::test_golden_plans_cost_what_dp_accounting_says",
    ),
    Mutant(
        "count-forgotten-equal-events",
        "equal events cost as much as the last of them",
        f"{_PRIVACY}/accounting.py",
        "counts[replace(event, count=1)] += event.count",
        "counts[replace(event, count=1)] = event.count",
        f"{ROUNDS}::test_a_round_run_again_makes_the_guarantee_worse_than_the_plans",
    ),
)
