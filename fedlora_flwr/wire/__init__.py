"""The words that server and client exchange in addition to arrays."""

ROUND = "server-round"
PLAN = "plan"
WEIGHTING = "weighting"
FINGERPRINT = "fingerprint"
# The factors that are exchanged (e.g. "A"), if other arrays that train stay with the client.
SHARE = "share"
# Whether a client starts from the arrays that it has kept, and not from the message's.
START_FROM = "start-from"
OWN = "own"
# μ of FedProx's proximal term, by which the global arrays attract a client's arrays.
PROXIMAL = "proximal-mu"
# Identity of the run that the server continues, if it differs from the run that Flower knows.
CONTINUES = "continues"
NAMES = "array-names"
CLIENT = "client"
STATUS = "status"
STATUS_OK = "ok"
STATUS_EXHAUSTED = "budget-exhausted"
WEIGHTINGS = ("uniform", "size", "inverse-noise")
# The largest magnitude in a message's arrays. Trained factors and heads stay below 100, and
# products of entries up to this limit stay far below the largest fp32 number.
MOST_ENTRY = 1e4
# Under a secure sum: the number of clients that a round asks, the noise multiplier of their sum,
# and the clip norm in units of the grid, C/γ.
COHORT = "cohort"
SUM_NOISE = "sum-noise"
GRID_NORM = "grid-norm"
SHARES = "shares"
# The messages of a secure sum, in their order: clients show their keys, seal shares of secrets,
# send their masked uploads, and open the sum. Besides words, each carries one packet of bytes.
STAGE = "sum-stage"
PACKET = "sum-packet"
SHOW_KEYS, SEAL_SHARES, UPLOAD, OPEN_SUM = STAGES = ("keys", "shares", "upload", "open")
# A client's account, and the time and memory of its round.
EPSILON = "epsilon"
EPSILON_BUDGET = "epsilon-budget"
DELTA = "delta"
ACCOUNTANT = "accountant"
STEPS = "steps"
SECONDS = "seconds"
PEAK_MEMORY = "peak-memory-mb"
WEIGHT = "weight"
NUM_EXAMPLES = "num-examples"
# Prefix of the name of an unprotected metric on private records.
UNPROTECTED = "unprotected-"
LOSS = "loss"
# The accuracy of a client's own model with the classes weighted as at the client, in a simulation.
OWN_LABELS = "accuracy_own_labels"
# Names of the records in Flower's messages.
ARRAYS = "arrays"
METRICS = "metrics"
CONFIG = "config"


def partition_name(number: int) -> str:
    """Return the identity of a simulated partition."""
    return f"partition-{number:06d}"
