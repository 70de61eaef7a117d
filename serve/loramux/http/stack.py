"""Our middleware, the outermost first. vLLM's and the user's own (`--middleware`) lie inside."""

from loramux.http.access_log import AccessLog
from loramux.http.auth import Authentication
from loramux.http.body_limit import BodyLimit
from loramux.http.calibrate import Calibrate
from loramux.http.composition import Composition
from loramux.http.error_shape import ErrorShape
from loramux.http.model_access import ModelAccess
from loramux.http.request_id import RequestId
from loramux.http.routing import RoutingReport
from loramux.http.scored import ScoredCompletion
from loramux.http.uncertainty import UncertaintyReport

MIDDLEWARE = (
    RequestId,
    AccessLog,
    ErrorShape,
    Authentication,
    BodyLimit,
    Calibrate,
    ScoredCompletion,
    ModelAccess,
    Composition,
    RoutingReport,
    UncertaintyReport,
)
