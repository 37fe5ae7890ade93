"""The words that server and client exchange beside arrays."""

ROUND = "server-round"
PLAN = "plan"
WEIGHTING = "weighting"
FINGERPRINT = "fingerprint"
# The factor that is exchanged ("A"), where the rest of what trains stays with the client.
SHARE = "share"
# What Flower's FedProx asks of a client: how strongly the global arrays pull.
PROXIMAL = "proximal-mu"
# The run that the server continues, where it is not the one that Flower knows.
CONTINUES = "continues"
NAMES = "array-names"
CLIENT = "client"
STATUS = "status"
STATUS_OK = "ok"
STATUS_EXHAUSTED = "budget-exhausted"
WEIGHTINGS = ("uniform", "size", "inverse-noise")
# The largest magnitude in a message's arrays. Trained factors and heads stay below a hundred, and
# products of entries up to here stay far from the largest number in fp32.
MOST_ENTRY = 1e4
# Under a secure sum: the clients that a round asks, the noise of their sum, and the grid norm C/γ.
COHORT = "cohort"
SUM_NOISE = "sum-noise"
GRID_NORM = "grid-norm"
SHARES = "shares"
# Its messages, in their order: keys are shown, shares of secrets are sealed, the masked upload
# leaves, and the sum is opened. What they carry beside words is one packet of bytes.
STAGE = "sum-stage"
PACKET = "sum-packet"
SHOW_KEYS, SEAL_SHARES, UPLOAD, OPEN_SUM = STAGES = ("keys", "shares", "upload", "open")
# The account that a client gives, and what its round took.
EPSILON = "epsilon"
EPSILON_BUDGET = "epsilon-budget"
DELTA = "delta"
ACCOUNTANT = "accountant"
STEPS = "steps"
SECONDS = "seconds"
PEAK_MEMORY = "peak-memory-mb"
WEIGHT = "weight"
NUM_EXAMPLES = "num-examples"
# The name of a metric on private records that nothing protects begins with this.
UNPROTECTED = "unprotected-"
LOSS = "loss"
# Names of a message's records.
ARRAYS = "arrays"
METRICS = "metrics"
CONFIG = "config"


def partition_name(number: int) -> str:
    """Return the identity of a simulated partition."""
    return f"partition-{number:06d}"
