from capsem.client.sync import Client as Client
from capsem.model.errors import AlreadyExists as AlreadyExists
from capsem.model.errors import CapsemError as CapsemError
from capsem.model.errors import Corrupt as Corrupt
from capsem.model.errors import GuestFailed as GuestFailed
from capsem.model.errors import HostNotReady as HostNotReady
from capsem.model.errors import Interrupted as Interrupted
from capsem.model.errors import InvalidInput as InvalidInput
from capsem.model.errors import LimitReached as LimitReached
from capsem.model.errors import MachineFailed as MachineFailed
from capsem.model.errors import NotFound as NotFound
from capsem.model.errors import NotRunning as NotRunning
from capsem.model.errors import PayloadTooLarge as PayloadTooLarge
from capsem.model.errors import PermissionDenied as PermissionDenied
from capsem.model.errors import TimedOut as TimedOut
from capsem.model.errors import Unavailable as Unavailable
from capsem.model.errors import Unsupported as Unsupported
from capsem.model.errors import WrongState as WrongState
from capsem.sdk.aio import AsyncProcess as AsyncProcess
from capsem.sdk.aio import AsyncSandbox as AsyncSandbox
from capsem.sdk.sync import Process as Process
from capsem.sdk.sync import Sandbox as Sandbox
from capsem.sdk.types import CommandFailed as CommandFailed
from capsem.sdk.types import Output as Output
from capsem.sdk.types import Result as Result

__version__: str
