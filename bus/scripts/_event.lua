-- The events stream: why something was refused, handed back, or went up and down. Bounded, never an error.
local EVENTS_MAX = 5000
local DEAD_MAX = 20000

local function report(events, kind, subject, why, detail)
  try('XADD', events, 'MAXLEN', '~', EVENTS_MAX, '*', 'type', kind, 'subject', subject, 'why', why, 'detail', detail or '')
end

local function bury(dead, keep_ms, source, entry, reason, detail)
  try('XADD', dead, 'MINID', '~', now - keep_ms, '*', 'source', source, 'entry', entry, 'reason', reason, 'fields', detail)
  -- Trimmed by time; a flood of nonsense must not fill the server before that.
  if call('XLEN', dead) > DEAD_MAX then
    try('XTRIM', dead, 'MAXLEN', DEAD_MAX)
  end
end
