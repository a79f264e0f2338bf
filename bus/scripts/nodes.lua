-- use: _view
-- Known nodes in full, dead or alive; those that have left on purpose are no longer counted.
-- KEYS nodes:known. ARGV prefix, ids (none = all).
local answer = {now}
local ids = {}
if #ARGV > 1 then
  ids = {unpack(ARGV, 2)}
else
  ids = call('ZRANGE', KEYS[1], 0, -1)
end
for _, id in ipairs(ids) do
  local one = view(ARGV[1], id, EVERYTHING)
  if one and one[8] ~= 'bye' and call('ZSCORE', KEYS[1], id) then
    answer[#answer + 1] = one
  end
end
return answer
