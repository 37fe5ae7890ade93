# Made of `__init__.py` by python -c 'import fedlora_flwr; print(fedlora_flwr._stub())'

# Whole runs.
from fedlora_flwr.simulations.simulate import simulate as simulate
from fedlora_flwr.server.run_result import RunResult as RunResult
from fedlora_flwr.server.run_result import load_runs as load_runs
from fedlora_flwr.forecast.plan_run import plan_run as plan_run
from fedlora_flwr.forecast.plan_budget import plan_budget as plan_budget
from fedlora_flwr.studies.comparing import compare as compare
from fedlora_flwr.studies.comparing import Compared as Compared
from fedlora_flwr.audit.audit_run import audit_run as audit_run
from fedlora_flwr.trained.evaluate import evaluate as evaluate
from fedlora_flwr.trained.evaluate import Evaluation as Evaluation
from fedlora_flwr.trained.sharpness import sharpness as sharpness
from fedlora_flwr.trained.sharpness import Sharpness as Sharpness
from fedlora_flwr.trained.predict import predict as predict
from fedlora_flwr.trained.merge import merge as merge
from fedlora_flwr.tasks.table_task import TableTask as TableTask

# Strategies.
from fedlora_flwr.strategies.base import FedLoRA as FedLoRA
from fedlora_flwr.strategies.dp_lora import DPLoRA as DPLoRA
from fedlora_flwr.strategies.ffa_lora import FFALoRA as FFALoRA
from fedlora_flwr.strategies.ffa_seeds import FFASeeds as FFASeeds
from fedlora_flwr.strategies.rolora import RoLoRA as RoLoRA
from fedlora_flwr.strategies.la_lora import LALoRA as LALoRA
from fedlora_flwr.strategies.as_lora import ASLoRA as ASLoRA
from fedlora_flwr.strategies.fedsvd import FedSVD as FedSVD
from fedlora_flwr.strategies.flexlora import FlexLoRA as FlexLoRA
from fedlora_flwr.strategies.flora import FLoRA as FLoRA
from fedlora_flwr.strategies.fedex_lora import FedExLoRA as FedExLoRA
from fedlora_flwr.strategies.fedsa_lora import FedSALoRA as FedSALoRA
from fedlora_flwr.strategies.mr_mtl import MRMTL as MRMTL
from fedlora_flwr.strategies.head_only import HeadOnly as HeadOnly
from fedlora_flwr.integrations.legacy_strategy import LegacyStrategy as LegacyStrategy

# Client and engine.
from fedlora_flwr.clients.numpy_client import LoRAClient as LoRAClient
from fedlora_flwr.clients.local_round import LocalRound as LocalRound
from fedlora_flwr.clients.trainer import LocalTrainer as LocalTrainer
from fedlora_flwr.clients.handler import answer_message as answer_message
from fedlora_flwr.clients.bridge import bridge as bridge
from fedlora_flwr.clients.device import client_identity as client_identity
from fedlora_flwr.integrations.planned_loop import follow_plan as follow_plan
from fedlora_flwr.integrations.planned_loop import follow_fit as follow_fit
from fedlora_flwr.privacy.engine import PrivateEngine as PrivateEngine
from fedlora_flwr.integrations.hf_trainer import PrivateTrainer as PrivateTrainer
from fedlora_flwr.simulations.local_grid import LocalGrid as LocalGrid
from fedlora_flwr.config.run_config import RunConfig as RunConfig
from fedlora_flwr.config.state import state_folder as state_folder
from fedlora_flwr.server.strategy import strategy_of as strategy_of

# Blocks.
from fedlora_flwr.plan import ComponentPlan as ComponentPlan
from fedlora_flwr.lora.adapters import AdaptedModel as AdaptedModel
from fedlora_flwr.lora.adapters import LoRASpec as LoRASpec
from fedlora_flwr.lora.adapters import attach as attach
from fedlora_flwr.data.records import TensorRecords as TensorRecords
from fedlora_flwr.privacy.mechanism import Mechanism as Mechanism
from fedlora_flwr.privacy.clip_weights import ClipWeights as ClipWeights
from fedlora_flwr.privacy.postprocessing.optimizer import OptimizerSettings as OptimizerSettings
from fedlora_flwr.privacy.noise import SecureNoise as SecureNoise
from fedlora_flwr.privacy.noise import SeededNoise as SeededNoise
from fedlora_flwr.privacy.budget import Segment as Segment
from fedlora_flwr.privacy.budget import calibrate as calibrate
from fedlora_flwr.privacy.budget import epsilon_spent as epsilon_spent
from fedlora_flwr.privacy.rounds_within import rounds_within as rounds_within
from fedlora_flwr.privacy.ledger import Ledger as Ledger
from fedlora_flwr.privacy.account import Account as Account
from fedlora_flwr.privacy.spent import Spent as Spent
from fedlora_flwr.privacy.spent import spent as spent

__version__: str
__all__: list[str]
def _stub() -> str: ...
