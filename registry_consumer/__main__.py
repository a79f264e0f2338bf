"""`python -m registry_consumer`: one registry consumer under its restarting parent. Run as many as you like."""

import os
import sys

from bus.process.parent import Role, run_role

if __name__ == "__main__":
    sys.exit(run_role(Role("registry_consumer", child="registry_consumer.service:run"), sys.argv[1:], os.environ))
