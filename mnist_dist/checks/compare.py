"""What the accounts of a run say: the first number that differs, with step, rank, parameter and kind."""

import statistics
from collections.abc import Sequence

from mnist_dist.checks.account import Account, Hashes, Step
from mnist_dist.checks.findings import Finding, find
from mnist_dist.checks.judge import most
from mnist_dist.distributed.world import World

SLOW = 4.0  # times the ranks' median of forward and backward: less is noise where ranks share cores
# Of a loss, nats, where bits may differ by right, and the steps after which rounding has grown too large to compare
# (docs/DOCTOR.md has what was measured).
TOLERANCES, TOLERATED_STEPS = {"fp32": 1e-3}, 10
OTHER_TOLERANCE = 1e-2  # of the precisions with fewer bits


def first_difference(one: Hashes, other: Hashes) -> str:
    """The first name whose hashes differ, or the empty string."""
    return next((name for name in other if one.get(name) != other[name]), "")


def compare_alone(world: World, accounts: Sequence[Account], model: str) -> list[Finding]:
    """Ranks that computed something else than most, each by itself."""
    ends = [account.steps[-1].weights for account in accounts]
    common = most(ends)
    usual = accounts[ends.index(common)]
    findings = []
    for rank, account in enumerate(accounts):
        if ends[rank] == common:
            continue
        for number, (step, other) in enumerate(zip(account.steps, usual.steps, strict=True)):
            kinds = [("a gradient", *pair) for pair in zip(step.gradients, other.gradients, strict=True)]
            kinds += [("the sum of gradients", step.total, other.total), ("the weights", step.weights, other.weights)]
            different = [(kind, first_difference(a, b)) for kind, a, b in kinds if a != b]
            if different:
                kind, name = different[0]
                words = {"who": world.name(rank), "model": model, "step": number, "kind": kind, "parameter": name}
                findings.append(find("alone.differs", [world.members[rank].host], **words))
                break
    return findings


def compare_together(world: World, accounts: Sequence[Account], reference: Account, model: str) -> list[Finding]:
    """The first thing in which the ranks, together, did not do what one did alone. Exact."""
    shards = len(reference.steps[0].gradients) // world.size
    for rank, account in enumerate(accounts):
        if name := first_difference(account.first_weights, reference.first_weights):
            return [difference("start.differs", world, rank, model, 0, name)]
    num_steps = min(len(account.steps) for account in accounts)
    for number, usual in enumerate(reference.steps[:num_steps]):
        steps = [account.steps[number] for account in accounts]
        for rank, step in enumerate(steps):
            mine = slice(rank * shards, (rank + 1) * shards)
            if step.images != usual.images[mine]:
                return [name_images(world, accounts, reference, rank, model, number)]
        for rank, step in enumerate(steps):
            for shard, hashes in enumerate(step.gradients, rank * shards):
                if name := first_difference(hashes, usual.gradients[shard]):
                    return [difference("gradient.differs", world, rank, model, number, name)]
        wrong = [rank for rank, step in enumerate(steps) if step.total != usual.total]
        if wrong:
            return [name_exchange(world, steps, usual, wrong, model, number)]
        for rank, step in enumerate(steps):
            if name := first_difference(step.weights, usual.weights):
                return [difference("weights.differ", world, rank, model, number, name)]
    return []


def difference(name: str, world: World, rank: int, model: str, step: int, parameter: str) -> Finding:
    """A finding about one rank at one step."""
    words = {"who": world.name(rank), "model": model, "step": step, "parameter": parameter}
    return find(name, [world.members[rank].host], **words)


def name_images(
    world: World, accounts: Sequence[Account], reference: Account, rank: int, model: str, number: int
) -> Finding:
    """Why a rank took other images than it should have."""
    taken = accounts[rank].steps[number].images
    earlier = [step.images for step in accounts[rank].steps[:number]]
    if taken in earlier:
        return difference("order.repeats", world, rank, model, number, "")
    shards = len(taken)
    for other in range(world.size):
        if taken == reference.steps[number].images[other * shards : (other + 1) * shards]:
            words = {"who": world.name(rank), "other": world.name(other), "model": model, "step": number}
            return find("images.of_another", [world.members[rank].host], **words)
    return difference("images.differ", world, rank, model, number, "")


def name_exchange(
    world: World, steps: Sequence[Step], usual: Step, wrong: list[int], model: str, number: int
) -> Finding:
    """Why a sum over the ranks is wrong, though all that went into it was right."""
    for rank in wrong:
        if steps[rank].total == steps[rank].partial:
            return difference("exchange.skipped", world, rank, model, number, "")
    rank = wrong[0]
    return difference("exchange.garbage", world, rank, model, number, first_difference(steps[rank].total, usual.total))


def compare_runs(
    world: World, accounts: Sequence[Account], before: Sequence[Account], name: str, model: str
) -> list[Finding]:
    """Ranks whose run ended with other weights than before; `name` is the finding's."""
    for rank, (account, other) in enumerate(zip(accounts, before, strict=True)):
        if parameter := first_difference(account.steps[-1].weights, other.steps[-1].weights):
            return [difference(name, world, rank, model, len(other.steps) - 1, parameter)]
    return []


def compare_losses(world: World, accounts: Sequence[Account], reference: Account, model: str) -> list[Finding]:
    """Losses that are further from one rank's than rounding explains, where bits may differ by right."""
    tolerance = TOLERANCES.get(world.precision, OTHER_TOLERANCE)
    for number, usual in enumerate(reference.steps[:TOLERATED_STEPS]):
        for rank, account in enumerate(accounts):
            loss = account.steps[number].loss if number < len(account.steps) else usual.loss
            if abs(loss - usual.loss) > tolerance:
                words = {"who": world.name(rank), "model": model, "step": number, "loss": loss, "usual": usual.loss}
                return [find("losses.differ", [world.members[rank].host], **words)]
    return []


def count_images(
    world: World, accounts: Sequence[Account], num_images: int, steps_per_epoch: int, labels: list[int], model: str
) -> list[Finding]:
    """Images that were not used once an epoch; orders that repeat; test images that were not counted once.

    This asks nothing of another run: it also finds what is wrong in the same way alone and together.
    """
    num_epochs = len(accounts[0].steps) // steps_per_epoch
    orders = []
    for epoch in range(num_epochs):
        part = slice(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
        used = [image for a in accounts for step in a.steps[part] for shard in step.images for image in shard]
        orders.append(used)
        if sorted(used) != list(range(num_images)):
            twice = len(used) - len(set(used))
            words = {"epoch": epoch, "twice": twice, "never": num_images - len(set(used)), "model": model}
            return [find("images.not_once", [], **words)]
    if len(orders) > 1 and orders[0] == orders[1]:
        return [find("order.repeats", [], who="every rank", model=model, step=steps_per_epoch)]
    for counts in accounts[0].counts:
        if counts != labels:
            words = {"who": world.name(0), "counted": sum(counts), "images": sum(labels), "model": model}
            return [find("evaluation.not_once", [world.members[0].host], **words)]
    return []


def compare_speed(world: World, accounts: Sequence[Account], model: str) -> list[Finding]:
    """Ranks that are far slower than the others in what they do alone."""
    if not all(account.steps for account in accounts):
        return []  # it ended before it began
    taken = [statistics.median(step.compute_s for step in account.steps) for account in accounts]
    median = statistics.median_low(taken)
    return [
        find("rank.slow", [world.members[r].host], who=world.name(r), ratio=seconds / median, model=model)
        for r, seconds in enumerate(taken)
        if seconds > SLOW * median
    ]
