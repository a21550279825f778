"""sqa-fx: rewrite the attention of a trained PyTorch model into Sparse Query Attention, and prove it."""

from sqa_fx.api import convert, inspect
from sqa_fx.backend import backend
from sqa_fx.checkpoint import CheckpointReport, convert_checkpoint
from sqa_fx.checkpoint_journal import verify_checkpoint
from sqa_fx.checkpoint_plan import plan
from sqa_fx.compiled_plans import compiled_graphs, last_plan
from sqa_fx.errors import SqaError
from sqa_fx.evaluate import Evaluation, evaluate
from sqa_fx.export import Artifact, export
from sqa_fx.generation import convert_for_generation
from sqa_fx.heal import heal
from sqa_fx.heal_options import HealOptions
from sqa_fx.heal_report import HealReport
from sqa_fx.module import ConvertedModule, load
from sqa_fx.partly import PartlyConvertedModule
from sqa_fx.plan import Plan
from sqa_fx.pretrained import from_pretrained
from sqa_fx.report import Report
from sqa_fx.surgery import SurgeryReport, convert_
from sqa_fx.surgery_record import Surgery
from sqa_fx.version import __version__

__all__ = [
    "Artifact",
    "CheckpointReport",
    "ConvertedModule",
    "Evaluation",
    "HealOptions",
    "HealReport",
    "PartlyConvertedModule",
    "Plan",
    "Report",
    "SqaError",
    "Surgery",
    "SurgeryReport",
    "__version__",
    "backend",
    "compiled_graphs",
    "convert",
    "convert_",
    "convert_checkpoint",
    "convert_for_generation",
    "evaluate",
    "export",
    "from_pretrained",
    "heal",
    "inspect",
    "last_plan",
    "load",
    "plan",
    "verify_checkpoint",
]
