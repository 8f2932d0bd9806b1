"""Names of the files and folders of a run; ``workdir.py`` shows where they belong."""

CONFIG = "config.json"
VERSIONS = "versions.json"
IMPORT = "import.json"  # in place of versions.json if the weights were imported
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TRACKED = "tracked.txt"  # name of the run at Weights & Biases or trackio
CHECKPOINTS = "checkpoints"
FILES = "files.json"  # in each checkpoint: digests of Orbax's own files
BEST = "best"  # the checkpoint that was best during the training
RECORD = "best.json"  # in BEST
DAMAGED = "damaged"

EVALUATION = "evaluation"
RESULTS = "results.json"
EXAMPLES = "examples.npz"
ADVERSARIAL = "adversarial.npz"
CORRUPTED = "corrupted.npz"  # predicted classes of corrupted images
CERTIFIED = "certified.npz"  # within how many of the radii each image is certified
AUDIT = "audit.npz"  # which images of the audit's sample are right at each point of its curves
OPTIMALITY = "optimality.npz"  # how many of the radii each image survives, by attack
PER_CLASS = "per_class.csv"
REPORT_HTML, REPORT_MARKDOWN = "report.html", "report.md"
UNFINISHED = "unfinished"

JOURNAL = ".bucket.jsonl"  # of a copy of a folder in a bucket: what is equal to what there

LOCK = ".lock"  # of the job that works in a folder
