-- One request of an address' allowance, by the generic cell rate algorithm (virtual scheduling, ITU-T I.371):
-- a minute's worth at once, then one every 60 s / allowance. KEYS rate. ARGV requests a minute.
-- Answers 0 = allowed, else ms to wait.
local interval = 60000 / tonumber(ARGV[1])
local due = math.max(tonumber(call('GET', KEYS[1]) or 0) or 0, now)
local early = due - now - (60000 - interval)
if early > 0 then
  return math.ceil(early)
end
call('DEL', KEYS[1]) -- so that the SET passes at maxmemory: it is the submit that refuses
call('SET', KEYS[1], string.format('%.3f', due + interval), 'PX', 120000)
return 0
