"""The replicated view: own rows, replication, queries. Rows are ordered by their owner; nobody writes another's."""

from pantala.catalogue.publisher import Publisher
from pantala.catalogue.replica import Replica
from pantala.catalogue.trust import Trust
from pantala.catalogue.view import View

__all__ = ["Publisher", "Replica", "Trust", "View"]
