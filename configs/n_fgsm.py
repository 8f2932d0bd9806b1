"""N-FGSM: AT with one step from a noisy start that is not projected.

De Jorge et al. (NeurIPS 2022). Not a row of RoBal's tables. Published on balanced CIFAR-10: PreActResNet-18,
30 epochs, 44.21 AA:

    python experiments/train.py --config=configs/n_fgsm.py:cifar10_lt --workdir=runs/cifar10_lt/n_fgsm

This is the paper's algorithm. The released code also clips the noise to the pixels' range before the
gradient, and its attack is a training pass that moves the running statistics:
``--config.attack.start=uniform_clipped --config.attack.batch_norm=batch_update``. Its learning rate rises to
0.2 and falls to 0 again.
"""

from configs import base


def get_config(data: str = "digits_lt") -> base.ConfigDict:
    """Noise of twice epsilon and a step of epsilon, which no ball of 3 epsilon cuts; it follows epsilon."""
    config = base.follow_up(data)
    config.method = "N-FGSM"
    config.attack.steps = 1
    config.attack.step_size = config.threat.get_oneway_ref("epsilon")
    config.attack.start = "uniform"
    config.attack.noise = 2.0
    config.attack.reach = 3.0
    return config
